"""What the sources hold now: every item with the digest of its bytes, of which only changed files are read."""

import gc
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from components.config import DataConfig
from components.curation.memory import FileDigest, hash_files, remembering
from components.curation.sources import Item, SourceReading, read_data
from components.stages import Bench, canonical_json


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
        rows = [[file.sha256, *(getattr(file.item, name) for name in _DIGESTED),
                 asdict(file.item.problem) if file.item.problem else None,
                 *([file.mask_sha256] if file.mask_sha256 else []),
                 *([list(file.item.variants)] if file.item.variants else []),
                 *(["is_reg"] if file.item.is_reg else []),
                 *([{"caption_by": file.item.caption_by}] if file.item.caption_by else [])] for file in self.files]
        return hashlib.sha256(canonical_json(rows)).hexdigest()


_OWN_WAY = (  # fields that the digest knows otherwise
    "path", "problem", "mask", "variants", "member", "is_reg", "origin", "caption_by")
_DIGESTED = tuple(field.name for field in fields(Item) if field.name not in _OWN_WAY)


def scan(bench: Bench, data: DataConfig, *, verify: bool = False, captioned: bool = True) -> Scan:
    """Read the sources' files and captions; unchanged files are not hashed again unless `verify`.

    Raises BadInput for sources that are missing, empty, without pictures or, if they must be `captioned`, captions.
    """
    with _everything_is_kept():
        reading = read_data(data, remembering(bench.catalog, verify=verify), captioned=captioned)
        alone = {path: None for item in reading.items for path in _files_of(item)}
        digests = hash_files(bench.catalog, list(alone), verify=verify)
        files = [_scanned(item, [digests[path] for path in _files_of(item)]) for item in reading.items]
        return Scan(tuple(files), sum(found.hashed for found in digests.values()), reading.sources)


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


def _files_of(item: Item) -> list[Path]:
    """The files whose bytes are the item's: its picture, unless a larger file holds it, and the file of its mask."""
    return [path for path in (item.path, item.mask) if path is not None and item.member is None]


def _scanned(item: Item, digests: Sequence[FileDigest]) -> ScannedFile:
    if item.member is not None:
        sha256 = item.member.sha256
        return ScannedFile(item, sha256, item.member.bytes, sha256 if item.mask is not None else None)
    problem = next((found.problem for found in digests if found.problem), None)
    picture = digests[0] if item.path is not None else None
    mask = digests[1].sha256 if item.mask is not None else None
    sha256, size = (picture.sha256, picture.bytes) if picture else (None, 0)
    if problem is not None and item.problem is None:
        item = replace(item, problem=problem)
    return ScannedFile(item, sha256, size, mask)
