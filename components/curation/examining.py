"""One decode of each picture whose bytes are new; what it told before is remembered by content."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import delete, insert, select

from components.catalog.models import ExaminedImage
from components.curation.checks import EXAMINE_VERSION, ImageFacts, Unreadable, examine
from components.curation.masks import mask_png, read_mask, require_use
from components.curation.scanning import ScannedFile
from components.curation.sources import Problem, read_picture
from components.errors import BadInput, DamagedArtifact
from components.shards import run_shards
from components.stages import Bench
from components.storage import ObjectRef, Store

MAX_FILE_BYTES = 512 << 20  # a larger picture file is refused unread
SHARD_ITEMS = 64  # images examined per commit: what a kill can cost each process
SHARD_BYTES = 64 << 20  # of files; more of them are not in one process's memory together, unless it is a single file
WRITERS = 16  # a write waits for the disk, so several wait together
INSERT_ROWS = 1000
ITEM_BYTES = 32 << 10  # what a picture costs beside its bytes, as bytes
WORTH_PROCESSES = 48 << 20  # bytes of work, some seconds of it; less is done before processes have started

Facts = ImageFacts | Unreadable
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """Some files to look at, and where to keep a copy of those that can be used."""

    files: tuple[ScannedFile, ...]
    known: tuple[bool, ...]  # of each file: it can be used, and only its bytes are missing from the store
    store: Store
    copied: bool = True

    def __str__(self) -> str:
        return f"{self.files[0].item.location} to {self.files[-1].item.location} ({len(self.files)} pictures)"


def examine_files(
    bench: Bench, files: Sequence[ScannedFile], on_progress: OnProgress, *, copied: bool = True
) -> tuple[dict[str, Facts], int]:
    """What one decode of each distinct file tells, from the catalog where it is known; if `copied`, bytes go into the
    store. Those of pictures inside larger files always do.

    Where there is enough to do, the workspace's crew does it. Commits shard by shard and in their order, so that a
    kill costs no more than the shards at work. Returns the facts by sha256, and how many images were decoded.
    """
    distinct = {file.sha256: file for file in files if file.sha256 is not None}
    facts = _known_facts(bench, list(distinct))
    todo = [file for sha256, file in distinct.items() if not _is_done(bench.store, facts.get(sha256), file, copied)]
    done, decoded = len(distinct) - len(todo), 0
    store = Store(bench.store.root)
    shards = [
        Shard(tuple(part), tuple(str(file.sha256) in facts for file in part), store, copied) for part in _cut(todo)
    ]
    on_progress(done, len(distinct))

    def commit(shard: Shard, found: Sequence[Facts | None]) -> None:
        nonlocal done, decoded
        fresh = {str(file.sha256): one for file, one in zip(shard.files, found, strict=True) if one is not None}
        _remember(bench, fresh)
        facts.update(fresh)
        done, decoded = done + len(shard.files), decoded + len(fresh)
        on_progress(done, len(distinct))

    if sum(file.bytes + ITEM_BYTES for file in todo) < WORTH_PROCESSES:
        for shard in shards:
            commit(shard, examine_shard(shard))
    else:
        run_shards(examine_shard, shards, commit, bench.workspace.crew, named=str)
    return facts, decoded


def examine_shard(shard: Shard) -> list[Facts | None]:
    """What a decode of each file tells, None of those that are known; the bytes of what can be used are stored.

    One picture is decoded at a time. Raises DamagedArtifact for a file that has changed since it was scanned.
    """
    found: list[Facts | None] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        writes = []
        for file, known in zip(shard.files, shard.known, strict=True):
            data = _read(file)
            facts = None if known else examine(data) if data is not None else _too_large(file)
            found.append(facts)
            kept = shard.copied or file.item.member is not None
            if kept and data is not None and not isinstance(facts, Unreadable):
                writes.append(pool.submit(shard.store.put, data))
        for write in writes:
            write.result()
    return found


def _cut(files: Sequence[ScannedFile]) -> Iterator[list[ScannedFile]]:
    """Shards of at most SHARD_ITEMS files, which together have at most SHARD_BYTES unless one alone has more."""
    part: list[ScannedFile] = []
    for file in files:
        if part and (len(part) == SHARD_ITEMS or sum(one.bytes for one in part) + file.bytes > SHARD_BYTES):
            yield part
            part = []
        part.append(file)
    if part:
        yield part


def read_masks(store: Store, files: Sequence[ScannedFile],
                examined: Mapping[str, Facts]) -> tuple[Sequence[ScannedFile], dict[str, str]]:
    """The files, those whose mask cannot be used with that problem, and the stored mask's sha256 by file name.

    A mask has the limits of a picture. Raises DamagedArtifact for one that has changed since it was scanned.
    """
    problems, masks = {}, {}
    for file in files:
        facts, item = examined.get(str(file.sha256)), file.item
        if item.mask is None or item.problem is not None or not isinstance(facts, ImageFacts):
            continue
        try:
            alpha = item.mask == item.location
            data = _read(file) if alpha else _read_mask_file(file)
            if data is None:
                raise BadInput(f"the file has more than {MAX_FILE_BYTES:,} bytes, which is no mask")
            mask = read_mask(data, alpha=alpha)
            require_use(mask, facts.width, facts.height)
            masks[item.file_name] = store.put(mask_png(mask)).sha256
        except BadInput as error:
            problems[item.file_name] = Problem("mask", f"{Path(item.mask).name}: {error}")
    if problems:
        files = [replace(file, item=replace(file.item, problem=problems[file.item.file_name]))
                 if file.item.file_name in problems else file for file in files]
    return files, masks


def _is_done(store: Store, known: Facts | None, file: ScannedFile, copied: bool) -> bool:
    if isinstance(known, ImageFacts) and (copied or file.item.member is not None):
        return store.keep(ObjectRef(str(file.sha256), file.bytes))
    return known is not None


def _read(file: ScannedFile) -> bytes | None:
    """The bytes that were scanned, or None where they are too many. Raises DamagedArtifact if they have changed."""
    if file.bytes > MAX_FILE_BYTES:
        return None
    return _as_scanned(Path(str(file.item.location)), file.sha256, lambda path: read_picture(file.item))


def _read_mask_file(file: ScannedFile) -> bytes | None:
    """As `_read`, of the file that holds a picture's mask."""

    def read(path: Path) -> bytes | None:
        return path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else None

    return _as_scanned(Path(str(file.item.mask)), file.mask_sha256, read)


def _as_scanned(path: Path, sha256: str | None, read: Callable[[Path], bytes | None]) -> bytes | None:
    """What `read` gives, if it has this digest. Raises DamagedArtifact."""
    try:
        data = read(path)
    except OSError as error:
        raise DamagedArtifact(f"{path}: {error.strerror} since it was scanned; run the same command again") from None
    if data is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedArtifact(f"{path}: changed while it was being read; run the same command again")
    return data


def _too_large(file: ScannedFile) -> Unreadable:
    return Unreadable(f"the file has {file.bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def _known_facts(bench: Bench, digests: Sequence[str]) -> dict[str, Facts]:
    known: dict[str, Facts] = {}
    with bench.catalog.read() as session:
        for start in range(0, len(digests), INSERT_ROWS):
            part = digests[start : start + INSERT_ROWS]
            query = select(ExaminedImage.sha256, ExaminedImage.facts).where(
                ExaminedImage.version == EXAMINE_VERSION, ExaminedImage.sha256.in_(part))
            known |= {sha256: _facts_from_json(facts) for sha256, facts in session.execute(query)}
    return known


def _remember(bench: Bench, fresh: Mapping[str, Facts]) -> None:
    if not fresh:
        return
    with bench.catalog.write() as session:
        session.execute(delete(ExaminedImage).where(ExaminedImage.version == EXAMINE_VERSION,
                                                    ExaminedImage.sha256.in_(fresh)))
        session.execute(insert(ExaminedImage), [
            {"sha256": sha256, "version": EXAMINE_VERSION, "facts": asdict(facts),
             "rgb_digest": facts.rgb_digest if isinstance(facts, ImageFacts) else None}
            for sha256, facts in fresh.items()])


def _facts_from_json(body: Mapping[str, Any]) -> Facts:
    if "reason" in body:
        return Unreadable(**body)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in body.items()}
    return ImageFacts(**values)
