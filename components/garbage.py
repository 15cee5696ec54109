"""What in the object store is still reachable, and what is not: counted, and on request deleted.

Reachable is what the catalog names (but for what it only remembers of files), what runs and unfinished trainings name
in their folders, what was exported, and whatever a reachable document names in turn. It is found carefully rather than
exactly: 64 hex digits count as a name wherever they stand. Everything else may be deleted once it is old. What somebody
keeps (`Store.put`, `Store.keep`) becomes young in the same moment, so work that is not committed yet loses nothing.

Latents can be made again, so the catalog's word for them ends too: `stale.py` says when.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from sqlalchemy import JSON, Column, Table, select

from components.catalog.database import Catalog
from components.catalog.models import Base
from components.errors import DamagedArtifact
from components.stages import Bench
from components.stale import NOTHING, Stale
from components.storage import Store
from components.workspace import Workspace, pieces_lock

NAME = re.compile(rb"(?<![0-9a-f])([0-9a-f]{2})/?([0-9a-f]{62})(?![0-9a-f])")  # with the slash of a path in the store
NAME_DIGITS = 64
EXPORT_DIGITS = 12  # of an adapter's sha256 in the name of its folder of exports
ROWS = 1000
TABLES = {  # of the catalog -> what the objects are that it names; the first that names one gives it its kind
    "stage_result": "results of",
    "snapshot": "snapshots",
    "snapshot_item": "pictures",
    "encoded_item": "latents and features",
    "adapter": "adapters",
    "generation": "galleries",
    "evaluation": "evaluations",
    "model_version": "model versions",
}
DOCUMENTS = frozenset({"stage_result", "snapshot"})  # tables that name objects which name others
REMEMBERED = frozenset(   # what was learnt or said of files claims no bytes
    {"source_file", "source_note", "examined_image", "stored_caption"})
NAMING = ("sha256", "digest", "shard")  # words in the names of columns that hold names
BEGINNINGS = {  # of a file -> what it is
    b"\x89PNG": "pictures", b"\xff\xd8\xff": "pictures", b"GIF8": "pictures", b"RIFF": "pictures", b"BM": "pictures",
    b"II*\0": "pictures", b"MM\0*": "pictures", b"PAR1": "tables", b"{": "documents", b"[": "documents"}


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as it lies in the store."""

    sha256: str
    bytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file or a folder outside the store that nothing needs."""

    path: Path
    bytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Pile:
    """A number of objects and their bytes."""

    objects: int
    bytes: int

    @classmethod
    def of(cls, found: "Iterable[StoredObject | Leftover]") -> "Pile":
        sizes = [one.bytes for one in found]
        return cls(len(sizes), sum(sizes))


@dataclass(frozen=True, slots=True)
class Survey:
    """Every object of the store at one moment, told apart by whether anything needs it."""

    before: datetime  # what was last wanted later than this is young
    reachable: tuple[StoredObject, ...]
    young: tuple[StoredObject, ...]  # not reachable, or not yet
    garbage: tuple[StoredObject, ...]
    damaged: tuple[str, ...]  # reachable documents whose bytes were altered: what they name is not known
    leftovers: tuple[Leftover, ...] = ()


def survey(bench: Bench, before: datetime, stale: Stale = NOTHING) -> Survey:
    """Tell the store's objects apart. `before` should lie before the beginning of every run that is not over yet.

    What is `stale` counts as not needed: have it forgotten before a sweep.
    """
    claimed, damaged = reachable(bench, stale)
    kept: list[StoredObject] = []
    young: list[StoredObject] = []
    garbage: list[StoredObject] = []
    for sha256, state in bench.store.objects():
        if sha256 in claimed:
            kept.append(StoredObject(sha256, state.st_size, claimed[sha256]))
        else:
            pile = young if state.st_mtime >= before.timestamp() else garbage
            pile.append(StoredObject(sha256, state.st_size, _kind_of(bench.store.path(sha256))))
    leftovers = tuple(_leftovers(bench, before, stale))
    return Survey(before, tuple(kept), tuple(young), tuple(garbage), tuple(damaged), leftovers)


def sweep(bench: Bench, found: Survey, *, on_delete: Callable[[StoredObject], None] = lambda one: None) -> Pile:
    """Delete what a survey calls garbage and nobody has wanted since; `on_delete` is called after each.

    Raises DamagedArtifact, with nothing deleted, where an altered document hides what is reachable.
    """
    if found.damaged:
        raise DamagedArtifact(
            f"object {found.damaged[0]} was altered and what rests on it is not known ({len(found.damaged)} such"
            f" objects), so nothing is deleted; run the recipe that made it again, or move {bench.store.root}/"
            f"{found.damaged[0][:2]}/{found.damaged[0][2:]} away"
        )
    deleted: list[StoredObject | Leftover] = []
    for one in found.garbage:
        path = bench.store.path(one.sha256)
        with bench.store.lock(alone=True):
            try:
                if path.stat().st_mtime >= found.before.timestamp():
                    continue
                path.unlink()
            except FileNotFoundError:
                continue
        for thumb in (bench.workspace.thumbs / one.sha256[:2]).glob(f"{one.sha256[2:]}-*.webp"):
            thumb.unlink(missing_ok=True)
        deleted.append(one)
        on_delete(one)
    deleted += [left for left in found.leftovers if _removed(bench, left)]
    return Pile.of(deleted)


def _leftovers(bench: Bench, before: datetime, stale: Stale) -> Iterator[Leftover]:
    """What killed processes have left behind, and folders whose adapters are gone."""
    workspace, limit = bench.workspace, before.timestamp()
    unfinished = (*bench.store.root.glob("??/.*.part"), *workspace.pieces.glob("*/.*.part"))
    pieces = workspace.pieces.glob("*/[!.]*")
    for kind, paths in (("unfinished writes", unfinished), ("latents of no shard", pieces)):
        for path in paths:
            with suppress(FileNotFoundError):
                state = path.stat()
                if state.st_mtime < limit:
                    yield Leftover(path, state.st_size, kind)
    for folder in stale.bases:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        yield Leftover(folder, size, "bases with tokens")


def _removed(bench: Bench, left: Leftover) -> bool:
    if left.path in bench.workspace.bases.glob("*"):
        shutil.rmtree(left.path, ignore_errors=True)
    elif left.path.is_relative_to(bench.workspace.pieces):
        with FileLock(pieces_lock(bench.workspace, left.path.parent)):
            left.path.unlink(missing_ok=True)
    else:
        left.path.unlink(missing_ok=True)
    return not left.path.exists()


def reachable(bench: Bench, stale: Stale = NOTHING) -> tuple[dict[str, str], list[str]]:
    """The kind of every object that is needed, by sha256, and the documents among them that were altered.

    Folders are read before the catalog: what a training commits in between is then seen in one of them.
    """
    in_folders = list(_in_folders(bench.workspace))
    claimed: dict[str, str] = {}
    pending: list[str] = []
    for kind, document, sha256 in (*_in_catalog(bench.catalog, stale), *in_folders):
        if sha256 not in claimed:
            claimed[sha256] = kind
            if document:
                pending.append(sha256)
    _claim_exports(bench, claimed)
    damaged = []
    while pending:
        parent = pending.pop()
        try:
            names = _names_in_object(bench.store, parent)
        except DamagedArtifact:
            damaged.append(parent)
            continue
        for sha256 in names:
            if sha256 not in claimed:
                claimed[sha256] = claimed[parent]
                pending.append(sha256)
    return claimed, damaged


def _in_catalog(catalog: Catalog, stale: Stale) -> Iterator[tuple[str, bool, str]]:
    """(kind, whether it may name others, sha256) of every name in the catalog but for what is stale."""
    forgotten = {"stage_result": stale.manifests, "encoded_item": stale.shards}
    tables = Base.metadata.tables
    for name in (*TABLES, *(name for name in tables if name not in {*TABLES, *REMEMBERED})):
        table = tables[name]
        columns = [column for column in table.columns if is_naming(column)]
        if not columns:
            continue
        kind = TABLES.get(name, name.replace("_", " "))
        for stage, values in _rows(catalog, table, columns):
            for sha256 in names_in(json.dumps(values, default=str).encode()) - forgotten.get(name, frozenset()):
                yield f"{kind} {stage}" if stage else kind, name in DOCUMENTS, sha256


def is_naming(column: Column[Any]) -> bool:
    """Whether a column holds names of objects: by its own name, or as a document that may hold anything."""
    named = any(word in column.name for word in NAMING) and not column.name.startswith("rgb_")
    return named or isinstance(column.type, JSON)


def _rows(catalog: Catalog, table: Table, columns: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """The stage that a row belongs to, where its table says so of results, and the columns' values."""
    stage = [table.c.stage] if table.name == "stage_result" else []
    with catalog.read() as session:
        for row in session.execute(select(*columns, *stage)).yield_per(ROWS):
            yield row[-1] if stage else "", list(row[: len(columns)])


def _in_folders(workspace: Workspace) -> Iterator[tuple[str, bool, str]]:
    """What runs and unfinished trainings name: pictures on their way to MLflow, adapters to go on from."""
    for folder, kind in ((workspace.home / "runs", "runs"), (workspace.home / "work", "unfinished trainings")):
        for path in (*folder.rglob("*.json"), *folder.rglob("*.jsonl")):
            with suppress(FileNotFoundError):  # of a training that has just ended
                for sha256 in names_in(path.read_bytes()):
                    yield kind, True, sha256


def _claim_exports(bench: Bench, claimed: dict[str, str]) -> None:
    """Adapters that were exported: their folders are called after the first digits of their names."""
    exported = {path.name for path in bench.workspace.exports.glob("*/*") if len(path.name) == EXPORT_DIGITS}
    if exported:
        for sha256, _ in bench.store.objects():
            if sha256[:EXPORT_DIGITS] in exported:
                claimed.setdefault(sha256, "exports")


def names_in(text: bytes) -> set[str]:
    """Every name of an object that stands in a text."""
    return {(first + rest).decode() for first, rest in NAME.findall(text)}


def _names_in_object(store: Store, sha256: str) -> set[str]:
    """What an object names if it is a document or a table; nothing if it is not there. Raises DamagedArtifact."""
    path = store.path(sha256)
    kind = _kind_of(path)
    if kind not in ("documents", "tables"):
        return set()
    data = store.read(sha256)
    return names_in(data) if kind == "documents" else _names_in_table(data)


def _names_in_table(data: bytes) -> set[str]:
    """The cells that are a name and nothing else."""
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        table = file.read(columns=[field.name for field in file.schema_arrow if pa.types.is_string(field.type)])
    found: set[str] = set()
    for column in table.columns:
        whole = column.filter(pc.equal(pc.binary_length(column), NAME_DIGITS))  # pyright: ignore[reportAttributeAccessIssue]
        found |= names_in("\n".join(whole.unique().to_pylist()).encode())
    return found


def _kind_of(path: Path) -> str:
    """What a file is, by its beginning; "nothing" where there is none."""
    try:
        with path.open("rb") as file:
            beginning = file.read(12)
    except FileNotFoundError:
        return "nothing"
    if (kind := next((kind for start, kind in BEGINNINGS.items() if beginning.startswith(start)), None)) is not None:
        return kind
    if beginning[4:8] == b"ftyp":
        return "pictures"
    return "tensors" if beginning[4:9] == b"\0\0\0\0{" else "other"  # safetensors: the header's length comes first
