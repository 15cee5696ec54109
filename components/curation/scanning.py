"""What the sources hold now: every item with the digest of its bytes, of which only changed files are read."""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any, Literal

from components.config import DataConfig
from components.curation.memory import CHUNK, FileDigest, Learn, Recall, hash_files, remembering
from components.curation.sources import Item, SourceReading, read_data
from components.stages import Bench, canonical_json

ScanStep = Literal["listing", "captions", "scanning"]  # of all files, of what speaks of pictures, of pictures
OnScan = Callable[[ScanStep, int, int | None], None]  # how many files so far, and of how many where that is known


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """An item of a source and what its bytes are."""

    item: Item
    sha256: str | None  # None: must not be opened, or cannot be
    bytes: int
    mask_sha256: str | None = None  # of the file that holds its mask


@dataclass(frozen=True, slots=True)
class Scan:
    """What the sources hold now, sorted by file name."""

    files: tuple[ScannedFile, ...]
    hashed: int  # files whose bytes were read; the others are as the catalog knows them
    sources: tuple[SourceReading, ...] = ()  # what is said of each source

    @property
    def digest(self) -> str:
        """Names the content: files, captions and provenance, but neither the folder's place nor times."""
        digest = hashlib.sha256(b"[")
        for i, file in enumerate(self.files):
            digest.update((b"," if i else b"") + canonical_json(_digested(file)))
        digest.update(b"]")
        return digest.hexdigest()


_OWN_WAY = (  # fields that the digest knows otherwise
    "location", "problem", "mask", "variants", "member", "is_reg", "origin", "caption_by")
_DIGESTED = tuple(field.name for field in fields(Item) if field.name not in _OWN_WAY)


def _digested(file: ScannedFile) -> list[Any]:
    item = file.item
    return [
        file.sha256, *(getattr(item, name) for name in _DIGESTED), asdict(item.problem) if item.problem else None,
        *([file.mask_sha256] if file.mask_sha256 else []), *([list(item.variants)] if item.variants else []),
        *(["is_reg"] if item.is_reg else []), *([{"caption_by": item.caption_by}] if item.caption_by else [])]


def unheard(step: ScanStep, done: int, total: int | None) -> None:
    """An OnScan for those who do not care."""


def scan(bench: Bench, data: DataConfig, *, verify: bool = False, captioned: bool = True,
         on_progress: OnScan = unheard) -> Scan:
    """Read the sources' files and captions; unchanged files are not hashed again unless `verify`.

    What is learnt is committed every CHUNK files, so that a scan that was killed goes on where it stopped. Raises
    BadInput for sources that are missing, empty, without pictures or, if they must be `captioned`, captions.
    """
    with _everything_is_kept():
        reading = read_data(data, _told(remembering(bench.catalog, verify=verify), on_progress), captioned=captioned,
                            on_listed=lambda files: on_progress("listing", files, None))
        items, hashed = reading.items, 0
        files: list[ScannedFile] = []
        for start in range(0, len(items), CHUNK):
            part = items[start : start + CHUNK]
            on_progress("scanning", start, len(items))
            paths = [_files_of(item) for item in part]
            digests = hash_files(bench.catalog, list(dict.fromkeys(chain(*paths))), verify=verify)
            files += [_scanned(item, [digests[path] for path in its]) for item, its in zip(part, paths, strict=True)]
            hashed += sum(found.hashed for found in digests.values())
        on_progress("scanning", len(items), len(items))
        return Scan(tuple(files), hashed, reading.sources)


def _told(recall: Recall, on_progress: OnScan) -> Recall:
    """The same Recall; how many captions and tables it has looked at is heard."""
    done = 0

    def telling(paths: Sequence[str], kind: str, learn: Learn) -> dict[str, bytes | OSError]:
        nonlocal done
        found = recall(paths, kind, learn)
        done += len(paths)
        if paths:
            on_progress("captions", done, None)
        return found

    return telling


@contextmanager
def _everything_is_kept() -> Iterator[None]:
    """Without the search for cycles, which goes through all items again and again while more are made: a quarter of
    the time of a scan that finds nothing new."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _files_of(item: Item) -> list[str]:
    """The files whose bytes are the item's: its picture, unless a larger file holds it, and the file of its mask."""
    return [where for where in (item.location, item.mask) if where is not None and item.member is None]


def _scanned(item: Item, digests: Sequence[FileDigest]) -> ScannedFile:
    if item.member is not None:
        sha256 = item.member.sha256
        return ScannedFile(item, sha256, item.member.bytes, sha256 if item.mask is not None else None)
    problem = next((found.problem for found in digests if found.problem), None)
    picture = digests[0] if item.location is not None else None
    mask = digests[1].sha256 if item.mask is not None else None
    sha256, size = (picture.sha256, picture.bytes) if picture else (None, 0)
    if problem is not None and item.problem is None:
        item = replace(item, problem=problem)
    return ScannedFile(item, sha256, size, mask)
