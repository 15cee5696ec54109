"""What earlier scans learnt of files: an unchanged one costs a look at its size and times, and is not opened.

A file is unchanged when size, mtime, ctime and inode are; that is not trusted where it was changed less than two
seconds before the scan that read it, since a second change within the clock's grain would leave no trace.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from sqlalchemy import ColumnElement, delete, insert, select, true
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute

from components.catalog.database import Catalog
from components.catalog.models import SourceFile, SourceNote
from components.curation.items import Problem
from components.errors import DamagedArtifact
from components.storage import sha256_of

TRUSTED_AGE_NS = 2_000_000_000  # coarse file clocks (FAT: two seconds) cannot tell younger changes apart
CHUNK = 500  # files per transaction and per query
KEPT_BYTES = 64 << 20  # what is learnt of a file and longer than this is learnt again by every scan
REMOTE = "hf://"  # begins the name of a file of the hub, which names a commit
AT_A_COMMIT = os.stat_result((0,) * 10, {"st_mtime_ns": 0, "st_ctime_ns": 0})  # such a file never changes

Each = TypeVar("Each")
Place = TypeVar("Place", str, Path)
Learn = Callable[[str], bytes]
Memory = type[SourceFile] | type[SourceNote]


class Recall(Protocol):
    """What `learn` makes of each file, from memory where the file is unchanged; an OSError where it cannot be read.

    `kind` names what is learnt; it changes when `learn` does. Files are named by text: making a path of it takes longer
    than looking at a file.
    """

    def __call__(self, paths: Sequence[str], kind: str, learn: Learn) -> dict[str, bytes | OSError]: ...


def afresh(paths: Sequence[str], kind: str, learn: Learn) -> dict[str, bytes | OSError]:
    """A Recall without memory."""
    found: dict[str, bytes | OSError] = {}
    for path in paths:
        try:
            found[path] = learn(path)
        except OSError as error:
            found[path] = error
    return found


def remembering(catalog: Catalog, *, verify: bool = False) -> Recall:
    """A Recall that keeps in the catalog what it learnt; `verify` learns everything again."""

    def recall(paths: Sequence[str], kind: str, learn: Learn) -> dict[str, bytes | OSError]:
        started_ns = time.time_ns()
        found: dict[str, bytes | OSError] = {}
        for chunk in _chunks(paths):
            known = {} if verify else _known_notes(catalog, chunk, kind)
            fresh: list[dict[str, Any]] = []
            for path in chunk:
                try:
                    now = state(path)
                    row = known.get(path)
                    if row is not None and _unchanged(row, now):
                        found[path] = row.learnt
                        continue
                    body = found[path] = learn(path)
                except OSError as error:
                    found[path] = error
                    continue
                if len(body) <= KEPT_BYTES:
                    fresh.append(_seen(path, now, started_ns) | {"kind": kind, "body": body})
            _remember(catalog, SourceNote, fresh, SourceNote.kind == kind)
        return found

    return recall


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file's bytes are, or why they could not be read."""

    sha256: str | None
    bytes: int
    hashed: bool  # False: known from an earlier scan
    problem: Problem | None = None


def hash_files(catalog: Catalog, paths: Sequence[Place], *, verify: bool = False) -> dict[Place, FileDigest]:
    """The sha256 of each file, from the catalog where the file is unchanged; `verify` hashes everything."""
    started_ns = time.time_ns()
    found: dict[Place, FileDigest] = {}
    for chunk in _chunks(paths):
        known = {} if verify else _known_files(catalog, chunk)
        fresh: list[dict[str, Any]] = []
        for path in chunk:
            try:
                now = state(path)
                row = known.get(str(path))
                if row is not None and _unchanged(row, now):
                    found[path] = FileDigest(row.learnt, row.size, hashed=False)
                    continue
                digest = sha256_of(Path(path))
            except OSError as error:
                found[path] = FileDigest(None, 0, hashed=False, problem=Problem("file", why_unreadable(error)))
                continue
            found[path] = FileDigest(digest, now.st_size, hashed=True)
            fresh.append(_seen(path, now, started_ns) | {"sha256": digest})
        _remember(catalog, SourceFile, fresh, true())
    return found


def reading_in_place(catalog: Catalog, objects: Path) -> Callable[[str], bytes | None]:
    """Reads pictures that were not copied: the bytes of this sha256 from a file that had them when it was last seen,
    one of `objects` left out.

    None where there was no such file. Raises DamagedArtifact, naming one, when each is gone or changed since.
    """

    def read(sha256: str) -> bytes | None:
        with catalog.read() as session:
            paths = session.scalars(select(SourceFile.path).where(SourceFile.sha256 == sha256)).all()
        why = ""
        for path in map(Path, paths):
            if path.is_relative_to(objects):
                continue
            try:
                data = path.read_bytes()
            except OSError as error:
                why = f"{path}: {error.strerror}"
                continue
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
            why = f"{path}: its bytes are not those that were curated"
        if not why:
            return None
        raise DamagedArtifact(f"{why}, and the workspace has no copy; put the file back, or curate what is there now")

    return read


def sizes_in_place(catalog: Catalog, digests: Sequence[str]) -> dict[str, int]:
    """The bytes of the files that had these sha256s when they were last seen; those never seen are left out."""
    found: dict[str, int] = {}
    with catalog.read() as session:
        for chunk in _chunks(digests):
            query = select(SourceFile.sha256, SourceFile.size).where(SourceFile.sha256.in_(chunk))
            found.update(session.execute(query).tuples().all())
    return found


def why_unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror}; change its permissions or remove it"


def _chunks(many: Sequence[Each]) -> Iterator[Sequence[Each]]:
    yield from (many[start : start + CHUNK] for start in range(0, len(many), CHUNK))


def state(path: str | Path) -> os.stat_result:
    """What tells whether a file has changed. Raises OSError."""
    if isinstance(path, str) and path.startswith(REMOTE):
        return AT_A_COMMIT
    return os.stat(path)  # noqa: PTH116  text stays text


def _seen(path: str | Path, now: os.stat_result, started_ns: int) -> dict[str, Any]:
    """The columns that tell later whether a file is unchanged."""
    return {"path": str(path), "size": now.st_size, "mtime_ns": now.st_mtime_ns, "ctime_ns": now.st_ctime_ns,
            "inode": now.st_ino, "seen_ns": started_ns}


class _Known(NamedTuple):
    """A file as last seen, and what was learnt of it: its sha256 or a note's body."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    seen_ns: int
    learnt: Any


def _unchanged(row: _Known, now: os.stat_result) -> bool:
    same = (row.size, row.mtime_ns, row.ctime_ns, row.inode) == (
        now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
    return same and max(row.mtime_ns, row.ctime_ns) < row.seen_ns - TRUSTED_AGE_NS


def _known_files(catalog: Catalog, paths: Sequence[str | Path]) -> dict[str, _Known]:
    return _known(catalog, SourceFile, SourceFile.sha256, paths, true())


def _known_notes(catalog: Catalog, paths: Sequence[str], kind: str) -> dict[str, _Known]:
    return _known(catalog, SourceNote, SourceNote.body, paths, SourceNote.kind == kind)


def _known(catalog: Catalog, model: Memory, learnt: InstrumentedAttribute[Any],
           paths: Sequence[str | Path], where: ColumnElement[bool]) -> dict[str, _Known]:
    """Plain rows, by path: an object for each would cost more than looking at the file does."""
    query = select(model.path, model.size, model.mtime_ns, model.ctime_ns, model.inode, model.seen_ns, learnt).where(
        model.path.in_([str(path) for path in paths]), where)
    with catalog.read() as session:
        return {row[0]: _Known(*row) for row in session.execute(query)}


def _remember(catalog: Catalog, model: Memory, rows: Sequence[dict[str, Any]], where: ColumnElement[bool]) -> None:
    if not rows:
        return
    with suppress(IntegrityError), catalog.write() as session:  # another process has just remembered the same
        session.execute(delete(model).where(model.path.in_([row["path"] for row in rows]), where))
        session.execute(insert(model), rows)
