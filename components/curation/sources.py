"""Reading folders of captioned pictures, in every layout people bring, as one list of items. Sources are never changed.

Layouts, which may be mixed: pictures with captions of the same stem beside them; a `metadata` table (JSON lines, CSV
or Parquet) with `file_name` and `text`; trees whose folders are named `10_sks dog` (repeats, then a fallback caption).
Only regular files inside the folder are opened; whatever cannot be used becomes an item with a problem.
"""

import csv
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy import delete, select

from components.catalog.database import Catalog
from components.catalog.models import SourceFile
from components.config import DataConfig, DataSource
from components.curation.captions import (
    CAPTION_SUFFIXES,
    CaptionLines,
    CaptionProblem,
    caption_cell,
    decode_text,
    read_caption,
    read_variants,
)
from components.curation.masks import mask_folder, mask_path, masks_in
from components.errors import BadInput
from components.storage import sha256_of

PICTURE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl",
    ".svg", ".eps", ".psd",  # the decoder refuses what it does not know, with a verdict that says so
})
TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PEERS_CACHES = frozenset({"_latent_cache", "_t_e_cache", "__pycache__", "__macosx"})  # other trainers', in lower case
NO_PICTURES = ("-masklabel", "-condlabel")  # stems' endings: masks and conditions, in other trainers' layout
REPEATS = re.compile(r"(\d+)_(.+)")  # a folder of the kohya layout
TRUSTED_AGE_NS = 2_000_000_000  # coarse file clocks (FAT: two seconds) cannot tell younger changes apart
HASH_CHUNK = 500  # files per transaction and per query
SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "test", "valid": "test", "val": "test"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file cannot become a sample, under the name of the check that says so."""

    check: str
    reason: str


@dataclass(frozen=True, slots=True)
class Item:
    """A picture as its source presents it: where it lies, what is said of it, or why it cannot be used."""

    file_name: str  # relative to the source's folder, with forward slashes; unique over all sources
    path: Path | None  # None when the file must not be opened
    caption: str = ""
    problem: Problem | None = None
    group: str | None = None
    split: str | None = None  # "train" or "test" where the source says so
    licence: str | None = None
    author: str | None = None
    source: str | None = None
    repeats: int = 1
    fallback: bool = False  # the caption is the folder's class tokens
    variants: tuple[str, ...] = ()  # other captions of it
    mask: Path | None = None  # the file that says where the picture counts; the picture itself: its alpha channel


def read_sources(data: DataConfig) -> list[Item]:
    """Every picture of every source, sorted by file name.

    With several sources file names begin with the source folder's name. Raises BadInput, one line, for a folder that
    is missing, is empty, holds no pictures, or holds not a single caption, and for a table that cannot be read.
    """
    if len(data.sources) == 1:
        return read_folder(data.sources[0])
    items, taken = [], set()
    for source in data.sources:
        prefix = next(name for name in _names(Path(source.path).name or "source") if name not in taken)
        taken.add(prefix)
        items += [replace(item, file_name=f"{prefix}/{item.file_name}") for item in read_folder(source)]
    return sorted(items, key=lambda item: item.file_name)


def read_folder(source: DataSource) -> list[Item]:
    """Every picture of one source folder, sorted by file name. Raises BadInput as `read_sources` does."""
    root, masks = _root_of(source), _masks_of(source)
    entries = [(name, entry) for name, entry in _files(root) if masks is None or not entry.path.is_relative_to(masks)]
    pictures = {str(name): entry for name, entry in entries if _is_picture(name)}
    listed = _table_items(root, [entry for name, entry in entries if name.name in TABLE_NAMES])
    if not pictures and not listed:
        raise BadInput(_no_pictures(root, len(entries)))
    captions = _caption_files(name for name, entry in entries if entry.problem is None)
    items = [
        _from_table(root, name, listed[name], pictures.get(name))
        if name in listed
        else _beside_caption(root, pictures[name], captions, source.caption_lines)
        for name in sorted(pictures.keys() | listed.keys())
    ]
    if all(item.problem is not None and item.problem.check == "caption" for item in items):
        reason = next(item.problem.reason for item in items if item.problem)
        raise BadInput(f"{root}: none of its {len(items)} pictures has a caption that can be used ({reason}); "
                       "write captions to files such as a.txt beside a.png, or to metadata.jsonl")
    if source.masks is not None:
        found = masks_in(masks) if masks else {}
        items = [
            replace(item, mask=mask_path(source, item.path, item.file_name, found)) if item.path else item
            for item in items
        ]
        if all(item.mask is None for item in items):
            raise BadInput(f"{root}: none of its {len(items)} pictures has a mask where masks = {source.masks!r} says; "
                           "give masks the pictures' names, or leave masks out")
    return [replace(item, licence=item.licence or source.licence) for item in items]


def _masks_of(source: DataSource) -> Path | None:
    folder = mask_folder(source)
    if folder is not None and not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of masks; give one, or masks = 'masklabel' or 'alpha'")
    return folder


def require_pictures(data: DataConfig) -> None:
    """Raises BadInput, as `read_sources` would, for a folder that is missing or empty. Opens no file."""
    for source in data.sources:
        root = _root_of(source)
        if next(_files(root), None) is None:
            raise BadInput(_no_pictures(root, 0))


def _no_pictures(root: Path, files: int) -> str:
    found = f"{files} files but no pictures" if files else "nothing"
    return f"{root}: holds {found}; expected pictures such as .png or .jpg with captions"


def _root_of(source: DataSource) -> Path:
    root = Path(source.path)
    if not root.exists():
        raise BadInput(f"{root}: no such folder; pass a folder of pictures with captions")
    if not root.is_dir():
        raise BadInput(f"{root}: is a file, expected a folder of pictures with captions")
    return root.resolve()


# walking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    name: PurePosixPath
    path: Path
    problem: Problem | None  # why it must not be opened
    folder: re.Match[str] | None  # the innermost folder of the kohya layout


def _files(root: Path) -> Iterator[tuple[PurePosixPath, "_Entry"]]:
    try:
        yield from _walk(root, PurePosixPath())
    except PermissionError as error:
        raise BadInput(f"{error.filename}: not readable by this user; change its permissions") from None


def _walk(root: Path, relative: PurePosixPath,
          folder: re.Match[str] | None = None) -> Iterator[tuple[PurePosixPath, _Entry]]:
    """Files under `root`, hidden ones and other trainers' caches aside. Links to folders are not entered."""
    with os.scandir(root / relative) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        name = relative / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name.lower() not in PEERS_CACHES:
                yield from _walk(root, name, REPEATS.fullmatch(entry.name) or folder)
        elif not Path(entry.path).is_dir():  # here a link, if it is one; False for a link to itself
            yield name, _Entry(name, root / name, _kind_problem(root, name, entry), folder)


def _kind_problem(root: Path, name: PurePosixPath, entry: os.DirEntry[str]) -> Problem | None:
    """Why the file is not opened: not regular, a link out of the folder, a name that is no text. Opens nothing."""
    try:
        str(name).encode("utf-8")
    except UnicodeEncodeError:
        return Problem("file", "the file's name is not UTF-8; rename it")
    if entry.is_symlink():
        try:
            target = (root / name).resolve(strict=True)
        except (OSError, RuntimeError):
            return Problem("file", "is a link that leads nowhere; replace it by the file")
        if not target.is_relative_to(root):
            return Problem("file", "is a link to a file outside the folder; copy the file into it")
    return None if entry.is_file() else Problem("file", "is not a regular file; remove it")


def _is_picture(name: PurePosixPath) -> bool:
    return name.suffix.lower() in PICTURE_SUFFIXES and not name.stem.endswith(NO_PICTURES)


def _printable(name: PurePosixPath) -> str:
    return str(name).encode("utf-8", "backslashreplace").decode()


def _names(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


# captions beside pictures -------------------------------------------------------------------------------------------


def _caption_files(names: Iterator[PurePosixPath]) -> dict[PurePosixPath, list[PurePosixPath]]:
    """Caption files by the path of the picture they describe, without its ending."""
    found: dict[PurePosixPath, list[PurePosixPath]] = {}
    for name in names:
        if name.suffix.lower() in CAPTION_SUFFIXES:
            found.setdefault(name.with_suffix(""), []).append(name)
    return found


def _beside_caption(root: Path, entry: _Entry, captions: Mapping[PurePosixPath, list[PurePosixPath]],
                    lines: CaptionLines) -> Item:
    repeats, tokens = (int(entry.folder[1]), entry.folder[2].strip()) if entry.folder else (1, "")
    item = Item(_printable(entry.name), entry.path, problem=entry.problem, repeats=max(1, repeats))
    if entry.problem:
        return replace(item, path=None)
    matches = captions.get(entry.name.with_suffix(""), [])
    if len(matches) > 1:
        raise BadInput(f"{root / entry.name}: has two captions, {matches[0].name} and {matches[1].name}; remove one")
    if matches:
        try:
            path, name = root / matches[0], str(matches[0])
            others = read_variants(path, name) if lines == "variants" else ()
            return replace(item, caption=read_caption(path, name, lines), variants=others)
        except CaptionProblem as problem:
            return replace(item, problem=Problem("caption", str(problem)))
    if tokens:
        return replace(item, caption=tokens, fallback=True)
    return replace(item, problem=Problem("caption", f"{entry.name}: no caption; write {entry.name.stem}.txt beside it"))


# tables -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    where: str  # table and line, for messages
    values: Mapping[str, Any]
    problem: Problem | None = None


def _table_items(root: Path, tables: list[_Entry]) -> dict[str, _Row]:
    """Rows by the file name they speak of, relative to the root. A table speaks for the folder that holds it."""
    found: dict[str, _Row] = {}
    speaker: dict[PurePosixPath, PurePosixPath] = {}
    for table in tables:
        folder = table.name.parent
        if table.problem:
            raise BadInput(f"{table.path}: {table.problem.reason}")
        if speaker.setdefault(folder, table.name) != table.name:
            raise BadInput(f"{root / folder}: has two tables, {speaker[folder].name} and {table.name.name}; remove one")
        for row in _read_table(table.path):
            name, problem = _contained(row.values.get("file_name"), row.where)
            key = str(folder / name) if problem is None else name
            if key in found:
                raise BadInput(f"{row.where}: {name!r} is listed twice, before in {found[key].where}; remove one")
            found[key] = replace(row, problem=problem)
    return found


def _contained(name: object, where: str) -> tuple[str, Problem | None]:
    """A table's file name, or why it is refused: it must stay inside the folder. Decided from the text alone."""
    if not isinstance(name, str) or not name.strip():
        return f"({where})", Problem("file", f"{where}: file_name is missing; name the picture")
    shown = name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    parts = PurePosixPath(name).parts
    if "\0" in name or "\\" in name or name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        return shown, Problem("file", f"{where}: file_name {shown!r} leaves the folder; name a file inside it")
    return str(PurePosixPath(name)) if shown == name else shown, None


def _from_table(root: Path, name: str, row: _Row, entry: _Entry | None) -> Item:
    values = row.values
    item = Item(name, root / name, problem=row.problem, group=_word(values, "group"),
                licence=_word(values, "licence") or _word(values, "license"), author=_word(values, "author"),
                source=_word(values, "source"), split=_split(row))
    if item.problem is None and entry is None:
        reason = f"{row.where}: {name!r} is not among the folder's pictures; add it or remove the line"
        item = replace(item, problem=Problem("file", reason))
    problem = item.problem or (entry.problem if entry else None)
    if problem:
        return replace(item, path=None, problem=problem)
    try:
        return replace(item, caption=caption_cell(values.get("text"), row.where))
    except CaptionProblem as wrong:
        return replace(item, problem=Problem("caption", str(wrong)))


def _word(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    text = "" if value is None else str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "").strip()
    return text or None


def _split(row: _Row) -> str | None:
    word = _word(row.values, "split")
    if word is None:
        return None
    if word.lower() not in SPLITS:
        raise BadInput(f"{row.where}: split is {word!r}, expected train or test")
    return SPLITS[word.lower()]


def _read_table(path: Path) -> Iterator[_Row]:
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        try:
            text = decode_text(path.read_bytes(), str(path))
        except CaptionProblem as problem:
            raise BadInput(str(problem)) from None
        rows = _json_rows(text, path) if path.suffix == ".jsonl" else _csv_rows(text, path)
    for line, values in rows:
        if "file_name" not in values or "text" not in values:
            absent = "file_name" if "file_name" not in values else "text"
            raise BadInput(f"{path}: line {line} has no {absent!r}; expected file_name and text")
        yield _Row(f"{path.name} line {line}", values)


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}; write it again") from None
    yield from enumerate(rows, start=1)


# hashing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file's bytes are, or why they could not be read."""

    sha256: str | None
    bytes: int
    hashed: bool  # False: known from an earlier scan
    problem: Problem | None = None


def hash_files(catalog: Catalog, paths: Sequence[Path], *, verify: bool = False) -> dict[Path, FileDigest]:
    """The sha256 of each file, from the catalog where the file is as it was when it was last hashed.

    A file is as it was when size, mtime, ctime and inode are; that is not trusted where the file was changed less than
    two seconds before the scan that hashed it, since a second change within the clock's grain would leave no trace.
    `verify` hashes everything.
    """
    started_ns = time.time_ns()
    known = {} if verify else _known_files(catalog, paths)
    found: dict[Path, FileDigest] = {}
    fresh: list[SourceFile] = []
    for path in paths:
        try:
            now = path.stat()
            row = known.get(str(path))
            if row is not None and _unchanged(row, now):
                found[path] = FileDigest(row.sha256, row.size, hashed=False)
                continue
            digest = sha256_of(path)
        except OSError as error:
            reason = f"cannot be read: {error.strerror}; change its permissions or remove it"
            found[path] = FileDigest(None, 0, hashed=False, problem=Problem("file", reason))
            continue
        found[path] = FileDigest(digest, now.st_size, hashed=True)
        fresh.append(SourceFile(path=str(path), size=now.st_size, mtime_ns=now.st_mtime_ns, ctime_ns=now.st_ctime_ns,
                                inode=now.st_ino, seen_ns=started_ns, sha256=digest))
        if len(fresh) >= HASH_CHUNK:
            _remember(catalog, fresh)
            fresh = []
    _remember(catalog, fresh)
    return found


def _unchanged(row: SourceFile, now: os.stat_result) -> bool:
    same = (row.size, row.mtime_ns, row.ctime_ns, row.inode) == (
        now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
    return same and max(row.mtime_ns, row.ctime_ns) < row.seen_ns - TRUSTED_AGE_NS


def _known_files(catalog: Catalog, paths: Sequence[Path]) -> dict[str, SourceFile]:
    known = {}
    with catalog.read() as session:
        for start in range(0, len(paths), HASH_CHUNK):
            chunk = [str(path) for path in paths[start : start + HASH_CHUNK]]
            for row in session.scalars(select(SourceFile).where(SourceFile.path.in_(chunk))):
                known[row.path] = row
    return known


def _remember(catalog: Catalog, rows: Sequence[SourceFile]) -> None:
    if rows:
        with catalog.write() as session:
            session.execute(delete(SourceFile).where(SourceFile.path.in_([row.path for row in rows])))
            session.add_all(rows)
