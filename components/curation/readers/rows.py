"""Data sets whose rows hold the pictures: Parquet files, and the Arrow files that `datasets` saves to disk.

The column of pictures is the one with an Image feature, or the first that holds bytes; that of captions the first of
the usual names, unless the recipe names them. The files are read where they are. A picture that a row only names by a
path is refused: the path leads out of the data set.
"""

import errno
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import IO, Any

from components.config import DataSource
from components.curation.captions import CaptionProblem, caption_cells
from components.curation.items import (
    PICTURE_SUFFIXES,
    SPLITS,
    Found,
    Item,
    Member,
    Problem,
    Skipped,
    ending_of,
    printable,
)
from components.curation.memory import REMOTE, Recall, state
from components.curation.readers.folders import without_caption
from components.curation.readers.hub import opened
from components.curation.readers.shards import read_shards
from components.curation.readers.tables import CAPTION_COLUMNS, provenance
from components.curation.readers.walking import Entry, Listing

SUFFIXES = (".parquet", ".arrow")
INDEX = "rows/1"  # changes when `_index` does
ABOUT = ("group", "split", "licence", "license", "author", "source")  # columns that are taken over, where they are text


def read_rows(listing: Listing, source: DataSource, recall: Recall) -> Found:
    """The pictures of every file of rows, named `file.parquet/0000012.png`.

    A file is of the split that its name or folder begins with, where the source has both sides.
    """
    files = listing.with_suffix(*SUFFIXES)
    skipped = list(listing.skipped)
    skipped += [Skipped(printable(entry.file_name), "no file of rows") for entry in listing.files if entry not in files]
    kind = f"{INDEX}/{source.image_column or ''}/{source.caption_column or ''}"
    learn = partial(_index, image_column=source.image_column, caption_column=source.caption_column)
    indexes = recall([entry.location for entry in files if not entry.problem], kind, learn)
    splits = {entry.file_name: _split_of(entry.name) for entry in files}
    both = {"train", "test"} <= set(splits.values())
    readable, items = read_shards(files, indexes)
    for entry, rows in readable:
        split = splits[entry.file_name] if both else None
        items += [_item(entry, row, split, source) for row in rows]
    return Found(sorted(items, key=lambda item: item.file_name), skipped)


def member_of_rows(location: str, member: Member) -> bytes:
    """The picture's bytes, as far as the file still holds them. Raises OSError for a file that is no longer one."""
    import pyarrow as pa

    group, row = member.place
    now = state(location)
    try:
        return _picture(_cells(location, (now.st_mtime_ns, now.st_size), group, member.column)[row].as_py())[0]
    except (pa.ArrowException, IndexError, KeyError):
        raise OSError(errno.EIO, "damaged or changed", location) from None


@lru_cache(maxsize=2)
def _cells(location: str, seen: tuple[int, int], group: int, column: str) -> Any:
    """One column of a row group, as it lies in the file; pictures are asked for in the file's order."""
    with _opened(location) as file:
        return file.group(group, [column]).column(0)


def _item(entry: Entry, row: Mapping[str, Any], split: str | None, source: DataSource) -> Item:
    name = f"{printable(entry.file_name)}/{row['row']:07}{row['suffix']}"
    where = f"{entry.name.name} row {row['row']}"
    item = Item(name, entry.location, **provenance(row["about"], where))
    item = replace(item, split=item.split or split)
    if "problem" in row:
        return replace(item, location=None, problem=Problem("file", f"{where}: {row['problem']}"))
    item = replace(item, member=Member((row["place"][0], row["place"][1]), row["column"], row["sha256"], row["bytes"]))
    if row["text"] is None:
        return without_caption(item, source.class_tokens, f"{where}: the caption is empty; write one")
    try:
        caption, *others = caption_cells(row["text"], where)
        return replace(item, caption=caption, variants=tuple(others))
    except CaptionProblem as wrong:
        return replace(item, problem=Problem("caption", str(wrong)))


def _split_of(name: PurePosixPath) -> str | None:
    words = (re.match(r"[a-z]*", part.lower()) for part in reversed(name.parts))
    return next((SPLITS[word[0]] for word in words if word and word[0] in SPLITS), None)


# files --------------------------------------------------------------------------------------------------------------


class _Parquet:
    def __init__(self, source: str | IO[bytes]):
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(source, memory_map=True)
        self.schema, self.groups = self.file.schema_arrow, self.file.num_row_groups

    def group(self, i: int, columns: list[str]) -> Any:
        return self.file.read_row_group(i, columns=columns)

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class _Arrow:
    """What `Dataset.save_to_disk` writes: a stream of record batches, here mapped into memory."""

    def __init__(self, location: str):
        import pyarrow as pa

        self.file = pa.memory_map(location)
        reader = pa.ipc.open_stream(self.file)
        self.schema, self.batches = reader.schema, list(reader)
        self.groups = len(self.batches)

    def group(self, i: int, columns: list[str]) -> Any:
        """Raises ArrowInvalid where the file's own offsets lead out of it, which nobody has looked at before."""
        batch = self.batches[i].select(columns)
        batch.validate(full=True)
        return batch

    def __enter__(self) -> "_Arrow":
        return self

    def __exit__(self, *_: object) -> None:
        """Cells that are still in use keep the file mapped."""


@contextmanager
def _opened(location: str) -> Iterator[_Parquet | _Arrow]:
    if location.startswith(REMOTE):
        with opened(location, in_order=False) as stream, _Parquet(stream) as file:
            yield file
    else:
        with _Parquet(location) if _is_parquet(location) else _Arrow(location) as file:
            yield file


def _is_parquet(location: str) -> bool:
    return ending_of(location).lower() == ".parquet"


# what they hold -----------------------------------------------------------------------------------------------------


def _index(location: str, *, image_column: str | None, caption_column: str | None) -> bytes:
    """Of each row, as JSON: the picture's place and sha256, or why there is none, the caption and what is said of it.

    Why there is nothing, as a string, for a file that is damaged, or has no column of pictures or of captions.
    """
    import pyarrow as pa

    try:
        with _opened(location) as file:
            image = _image_column(file.schema, image_column)
            caption = _caption_column(file.schema, caption_column)
            about = [name for name in ABOUT if name in file.schema.names and name not in (image, caption)]
            rows = list(_rows(file, image, caption, about))
    except _Unsuitable as error:
        return json.dumps(str(error)).encode()
    except (pa.ArrowException, ValueError, ArithmeticError, MemoryError) as error:
        what = "Parquet" if _is_parquet(location) else "Arrow"
        said = " ".join(str(error).split())[:200] or type(error).__name__
        return json.dumps(f"not a readable {what} file: {said}; write it again").encode()
    return json.dumps(rows, default=lambda value: {"type": type(value).__name__}).encode()


def _rows(file: _Parquet | _Arrow, image: str, caption: str, about: list[str]) -> Iterator[dict[str, Any]]:
    number = 0
    for group in range(file.groups):
        table = file.group(group, list(dict.fromkeys([image, caption, *about])))
        for i in range(table.num_rows):
            data, name = _picture(table[image][i].as_py())
            suffix = PurePosixPath(name).suffix.lower()
            row: dict[str, Any] = {
                "row": number, "suffix": suffix if suffix in PICTURE_SUFFIXES else "",
                "text": table[caption][i].as_py(),
                "about": {key: text for key in about if isinstance(text := table[key][i].as_py(), str)},
            }
            if data:
                row |= {"place": [group, i], "column": image, "sha256": hashlib.sha256(data).hexdigest(),
                        "bytes": len(data)}
            else:
                row["problem"] = "names its picture by a path" if name else "holds no picture"
                row["problem"] += "; write the picture's bytes into the row"
            yield row
            number += 1


def _picture(cell: Any) -> tuple[bytes, str]:
    """Bytes and path of a cell with an Image feature or plain bytes; empty where it has none."""
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        return (data if isinstance(data, bytes) else b""), (path if isinstance(path, str) else "")
    return (cell if isinstance(cell, bytes) else b""), ""


class _Unsuitable(Exception):
    """A sound file without a column that is needed."""


def _image_column(schema: Any, wanted: str | None) -> str:
    import pyarrow as pa

    if wanted is not None:
        if wanted in schema.names:
            return wanted
        raise _Unsuitable(f"has no column {wanted!r}, only {', '.join(schema.names)}; correct image_column")
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        said = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in schema.names]
    except (ValueError, KeyError, TypeError, AttributeError):
        said = []
    of_bytes = [
        column.name for column in schema
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        or (pa.types.is_struct(column.type) and any(column.type.field(i).name == "bytes"
                                                    for i in range(column.type.num_fields)))
    ]
    for name in (*said, *of_bytes):
        return name
    raise _Unsuitable(f"no column holds pictures, there are {', '.join(schema.names)}; name one with image_column")


def _caption_column(schema: Any, wanted: str | None) -> str:
    for name in (wanted,) if wanted is not None else CAPTION_COLUMNS:
        if name in schema.names:
            return name
    said = f"no column {wanted!r}" if wanted is not None else f"none of {', '.join(CAPTION_COLUMNS)}"
    raise _Unsuitable(f"has {said}, only {', '.join(schema.names)}; name the captions with caption_column")
