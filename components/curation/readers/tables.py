"""Tables of captions beside pictures: `metadata` as JSON lines, CSV or Parquet, and other trainers' JSON files.

A table speaks for the folder that holds it. Its file names are text from elsewhere: what is not a plain relative name
is refused, entry by entry, and nothing is opened for it.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from components.config import DataSource
from components.curation.captions import CaptionProblem, caption_cells, decode_text
from components.curation.items import SPLITS, Item, Problem, Skipped, is_picture, printable
from components.curation.memory import Recall, why_unreadable
from components.curation.readers.walking import Entry
from components.errors import BadInput

TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
JSON_TABLES = ("captions.json", "meta.json")  # diffusion-pipe's {file: [captions]}, kohya's {file: {caption, tags}}
NAME_COLUMNS = ("file_name", "image_path", "filename", "image", "path")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
PLAIN = re.compile(r"\w[\w .()+-]*")  # a file name that needs no closer look: of one part, and printable


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table; `values` has the file's name under "file_name" and its caption under "text"."""

    where: str  # table and line, for messages
    values: Mapping[str, Any]
    problem: Problem | None = None


def table_rows(root: Path, tables: Sequence[Entry], source: DataSource, recall: Recall) -> dict[str, Row]:
    """Rows of `metadata` tables by the file name they speak of, relative to the root.

    Raises BadInput for a table that cannot be read, two tables in a folder and a file that is listed twice.
    """
    found: dict[str, Row] = {}
    speaker: dict[PurePosixPath, PurePosixPath] = {}
    contents = _contents(tables, recall)
    for table in tables:
        folder = table.name.parent
        if speaker.setdefault(folder, table.name) != table.name:
            raise BadInput(f"{root / folder}: has two tables, {speaker[folder].name} and {table.name.name}; remove one")
        before = f"{folder}/" if folder.parts else ""
        for row in _read_table(table.path, contents[table.location], source):
            name, problem = contained(row.values.get("file_name"), row.where)
            key = f"{before}{name}" if problem is None else name
            if key in found:
                raise BadInput(f"{row.where}: {name!r} is listed twice, before in {found[key].where}; remove one")
            found[key] = replace(row, problem=problem) if problem else row
    return found


def json_rows(entries: Sequence[Entry], pictures: Mapping[str, Entry], spoken_for: Mapping[PurePosixPath, str],
              recall: Recall) -> tuple[dict[str, Row], list[Skipped]]:
    """Rows of other trainers' JSON files, and those files that say nothing of this folder's pictures.

    `spoken_for` are folders that have another table, which counts. A key names a picture with or without its ending.
    """
    found: dict[str, Row] = {}
    skipped: list[Skipped] = []
    taken = dict(spoken_for)
    stems: dict[str, list[str]] = {}
    for name, picture in pictures.items():
        stems.setdefault(picture.stem, []).append(name)
    for entry in sorted(entries, key=lambda entry: JSON_TABLES.index(entry.name.name)):
        folder = entry.name.parent
        if folder in taken:
            skipped.append(Skipped(printable(entry.file_name), f"{taken[folder]} speaks for this folder"))
            continue
        captions = _json_captions(_contents([entry], recall)[entry.location])
        rows = {} if captions is None else _placed(captions, entry.name, pictures, stems)
        if any(name in pictures for name in rows):
            taken[folder] = entry.name.name
            found |= rows
        else:
            skipped.append(Skipped(printable(entry.file_name), "no table of captions of this folder's pictures"))
    return found, skipped


def from_row(root: Path, name: str, row: Row, entry: Entry | None) -> Item:
    """The item that a row describes; `entry` is the file of its name, if there is one."""
    said = provenance(row.values, row.where)
    problem = row.problem or (entry.problem if entry else None)
    if problem is None and entry is None:
        reason = f"{row.where}: {name!r} is not among the folder's pictures; add it or remove the line"
        problem = Problem("file", reason)
    if problem or entry is None:
        return Item(name, None, problem=problem, **said)
    try:
        caption, *others = caption_cells(row.values.get("text"), row.where)
        return Item(name, entry.location, caption=caption, variants=tuple(others), **said)
    except CaptionProblem as wrong:
        return Item(name, entry.location, problem=Problem("caption", str(wrong)), **said)


def provenance(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of an Item that a table's other columns tell. Raises BadInput for a split of another name."""
    word = _word(values, "split")
    if word is not None and word.lower() not in SPLITS:
        raise BadInput(f"{where}: split is {word!r}, expected train or test")
    said = {"group": _word(values, "group"), "licence": _word(values, "licence") or _word(values, "license"),
            "author": _word(values, "author"), "source": _word(values, "source"),
            "split": SPLITS[word.lower()] if word else None}
    return {name: value for name, value in said.items() if value is not None}


def contained(name: object, where: str) -> tuple[str, Problem | None]:
    """A table's file name, or why it is refused: it must stay inside the folder. Decided from the text alone."""
    if not isinstance(name, str) or not name.strip():
        return f"({where})", Problem("file", f"{where}: file_name is missing; name the picture")
    if PLAIN.fullmatch(name):
        return name, None
    shown = printable(name)
    parts = PurePosixPath(name).parts
    if "\0" in name or "\\" in name or name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        return shown, Problem("file", f"{where}: file_name {shown!r} leaves the folder; name a file inside it")
    return str(PurePosixPath(name)) if shown == name else shown, None


def _word(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is None:
        return None
    text = str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "").strip()
    return text or None


def _read_bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def _contents(tables: Sequence[Entry], recall: Recall) -> dict[str, bytes]:
    for table in tables:
        if table.problem:
            raise BadInput(f"{table.path}: {table.problem.reason}")
    found: dict[str, bytes] = {}
    for path, body in recall([table.location for table in tables], "bytes", _read_bytes).items():
        if isinstance(body, OSError):
            raise BadInput(f"{path}: {why_unreadable(body)}")
        found[path] = body
    return found


# metadata -----------------------------------------------------------------------------------------------------------


def _read_table(path: Path, data: bytes, source: DataSource) -> Iterator[Row]:
    if path.suffix == ".parquet":
        rows = _parquet_rows(data, path)
    else:
        try:
            text = decode_text(data, str(path))
        except CaptionProblem as problem:
            raise BadInput(str(problem)) from None
        rows = _line_rows(text, path) if path.suffix == ".jsonl" else _csv_rows(text, path)
    names = (source.image_column,) if source.image_column else NAME_COLUMNS
    captions = (source.caption_column,) if source.caption_column else CAPTION_COLUMNS
    for line, values in rows:
        name, caption = _first(names, values), _first(captions, values)
        if name is None or caption is None:
            absent = names[0] if name is None else captions[0]
            raise BadInput(f"{path}: line {line} has no {absent!r}; expected {names[0]} and {captions[0]}")
        yield Row(f"{path.name} line {line}", {**values, "file_name": values[name], "text": values[caption]})


def _first(wanted: Sequence[str], values: Mapping[str, Any]) -> str | None:
    return next((name for name in wanted if name in values), None)


def _line_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise BadInput(f"{path}: line {number} is not a JSON object; expected {{\"file_name\": …, \"text\": …}}")
        yield number, values


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise BadInput(f"{path}: not valid CSV: {error}; fix that line") from None


def _parquet_rows(data: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: not a readable Parquet file: {said}; write it again") from None
    yield from enumerate(rows, start=1)


# other trainers' JSON -----------------------------------------------------------------------------------------------


def _json_captions(data: bytes) -> dict[str, Any] | None:
    """Caption or list of captions by the key that names the picture; None where the file holds something else."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or not all(isinstance(value, str | list | dict) for value in body.values()):
        return None
    return {key: _joined(value) if isinstance(value, dict) else value for key, value in body.items()}


def _joined(entry: Mapping[str, Any]) -> Any:
    """kohya's fine-tuning entry: the caption, then its tags, as its trainer joins them."""
    parts = [entry.get("caption"), entry.get("tags")]
    words = [part for part in parts if isinstance(part, str) and part.strip()]
    return ", ".join(words) or None


def _placed(captions: Mapping[str, Any], table: PurePosixPath, pictures: Mapping[str, Entry],
            stems: Mapping[str, Sequence[str]]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for key, value in captions.items():
        where = f"{table.name} entry {printable(key)!r}"
        name, problem = contained(key, where)
        full = str(table.parent / name) if problem is None else name
        row = Row(where, {"file_name": key, "text": value}, problem)
        named = [full] if full in pictures or is_picture(full) else stems.get(full, [full])
        rows |= dict.fromkeys(named, row)
    return rows
