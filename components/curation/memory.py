"""What earlier scans learnt of files: an unchanged one costs a look at its size and times, and is not opened.

A file is unchanged when size, mtime, ctime and inode are; that is not trusted where it was changed less than two
seconds before the scan that read it, since a second change within the clock's grain would leave no trace.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from components.catalog.database import Catalog
from components.catalog.models import SourceFile, SourceNote
from components.curation.items import Problem
from components.storage import sha256_of

TRUSTED_AGE_NS = 2_000_000_000  # coarse file clocks (FAT: two seconds) cannot tell younger changes apart
CHUNK = 500  # files per transaction and per query
KEPT_BYTES = 64 << 20  # what is learnt of a file and longer than this is learnt again by every scan

Learn = Callable[[Path], bytes]


class Recall(Protocol):
    """What `learn` makes of each file, from memory where the file is unchanged; an OSError where it cannot be read.

    `kind` names what is learnt; it changes when `learn` does.
    """

    def __call__(self, paths: Sequence[Path], kind: str, learn: Learn) -> dict[Path, bytes | OSError]: ...


def afresh(paths: Sequence[Path], kind: str, learn: Learn) -> dict[Path, bytes | OSError]:
    """A Recall without memory."""
    found: dict[Path, bytes | OSError] = {}
    for path in paths:
        try:
            found[path] = learn(path)
        except OSError as error:
            found[path] = error
    return found


def remembering(catalog: Catalog, *, verify: bool = False) -> Recall:
    """A Recall that keeps in the catalog what it learnt; `verify` learns everything again."""

    def recall(paths: Sequence[Path], kind: str, learn: Learn) -> dict[Path, bytes | OSError]:
        started_ns = time.time_ns()
        found: dict[Path, bytes | OSError] = {}
        for chunk in _chunks(paths):
            known = {} if verify else _known_notes(catalog, chunk, kind)
            fresh: list[SourceNote] = []
            for path in chunk:
                try:
                    now = path.stat()
                    row = known.get(str(path))
                    if row is not None and _unchanged(row, now):
                        found[path] = row.body
                        continue
                    body = found[path] = learn(path)
                except OSError as error:
                    found[path] = error
                    continue
                if len(body) <= KEPT_BYTES:
                    fresh.append(SourceNote(path=str(path), kind=kind, size=now.st_size, mtime_ns=now.st_mtime_ns,
                                            ctime_ns=now.st_ctime_ns, inode=now.st_ino, seen_ns=started_ns, body=body))
            _remember(catalog, SourceNote, fresh)
        return found

    return recall


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file's bytes are, or why they could not be read."""

    sha256: str | None
    bytes: int
    hashed: bool  # False: known from an earlier scan
    problem: Problem | None = None


def hash_files(catalog: Catalog, paths: Sequence[Path], *, verify: bool = False) -> dict[Path, FileDigest]:
    """The sha256 of each file, from the catalog where the file is unchanged; `verify` hashes everything."""
    started_ns = time.time_ns()
    found: dict[Path, FileDigest] = {}
    for chunk in _chunks(paths):
        known = {} if verify else _known_files(catalog, chunk)
        fresh: list[SourceFile] = []
        for path in chunk:
            try:
                now = path.stat()
                row = known.get(str(path))
                if row is not None and _unchanged(row, now):
                    found[path] = FileDigest(row.sha256, row.size, hashed=False)
                    continue
                digest = sha256_of(path)
            except OSError as error:
                found[path] = FileDigest(None, 0, hashed=False, problem=Problem("file", why_unreadable(error)))
                continue
            found[path] = FileDigest(digest, now.st_size, hashed=True)
            fresh.append(SourceFile(path=str(path), size=now.st_size, mtime_ns=now.st_mtime_ns,
                                    ctime_ns=now.st_ctime_ns, inode=now.st_ino, seen_ns=started_ns, sha256=digest))
        _remember(catalog, SourceFile, fresh)
    return found


def why_unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror}; change its permissions or remove it"


def _chunks(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    yield from (paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK))


def _unchanged(row: SourceFile | SourceNote, now: os.stat_result) -> bool:
    same = (row.size, row.mtime_ns, row.ctime_ns, row.inode) == (
        now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
    return same and max(row.mtime_ns, row.ctime_ns) < row.seen_ns - TRUSTED_AGE_NS


def _known_files(catalog: Catalog, paths: Sequence[Path]) -> dict[str, SourceFile]:
    with catalog.read() as session:
        query = select(SourceFile).where(SourceFile.path.in_([str(path) for path in paths]))
        return {row.path: row for row in session.scalars(query)}


def _known_notes(catalog: Catalog, paths: Sequence[Path], kind: str) -> dict[str, SourceNote]:
    with catalog.read() as session:
        query = select(SourceNote).where(SourceNote.kind == kind, SourceNote.path.in_([str(path) for path in paths]))
        return {row.path: row for row in session.scalars(query)}


def _remember(catalog: Catalog, model: type[SourceFile] | type[SourceNote],
              rows: Sequence[SourceFile] | Sequence[SourceNote]) -> None:
    if not rows:
        return
    stale = delete(model).where(model.path.in_([row.path for row in rows]))
    if isinstance(rows[0], SourceNote):
        stale = stale.where(SourceNote.kind == rows[0].kind)
    with suppress(IntegrityError), catalog.write() as session:  # another process has just remembered the same
        session.execute(stale)
        session.add_all(rows)
