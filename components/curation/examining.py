"""One decode of each picture whose bytes are new; what it told before is remembered by content."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sqlalchemy import delete, insert, select

from components.catalog.models import ExaminedImage
from components.curation.checks import EXAMINE_VERSION, ImageFacts, Unreadable, examine
from components.curation.masks import mask_png, read_mask, require_use
from components.curation.scanning import ScannedFile
from components.curation.sources import Problem, read_picture
from components.errors import BadInput, DamagedArtifact
from components.stages import Bench
from components.storage import ObjectRef, Store

MAX_FILE_BYTES = 512 << 20  # a larger picture file is refused unread
CHUNK = 64  # images examined per commit: what a kill can cost
WRITERS = 8  # a write waits for the disk, so several wait together
INSERT_ROWS = 1000

Facts = ImageFacts | Unreadable
OnProgress = Callable[[int, int], None]


def examine_files(bench: Bench, files: Sequence[ScannedFile], on_progress: OnProgress) -> tuple[dict[str, Facts], int]:
    """What one decode of each distinct file tells, from the catalog where it is known; bytes go into the store.

    Commits every CHUNK images, so that a kill costs no more than these. Returns the facts by sha256, and how many
    images were decoded.
    """
    distinct = {file.sha256: file for file in files if file.sha256 is not None}
    facts = _known_facts(bench, list(distinct))
    todo = [file for sha256, file in distinct.items() if not _is_done(bench.store, facts.get(sha256), file)]
    done, decoded, fresh = len(distinct) - len(todo), 0, {}
    on_progress(done, len(distinct))
    with ThreadPoolExecutor(WRITERS) as pool:
        for start in range(0, len(todo), CHUNK):
            chunk, writes = todo[start : start + CHUNK], []
            for file in chunk:
                known = facts.get(str(file.sha256))
                data = _read(file)
                if known is None:
                    known = fresh[str(file.sha256)] = examine(data) if data is not None else _too_large(file)
                    decoded += 1
                if isinstance(known, ImageFacts) and data is not None:
                    writes.append(pool.submit(bench.store.put, data))
            for write in writes:
                write.result()
            _remember(bench, fresh)
            facts |= fresh
            done, fresh = done + len(chunk), {}
            on_progress(done, len(distinct))
    return facts, decoded


def read_masks(store: Store, files: Sequence[ScannedFile],
                examined: Mapping[str, Facts]) -> tuple[list[ScannedFile], dict[str, str]]:
    """The files, those whose mask cannot be used with that problem, and the stored mask's sha256 by file name."""
    problems, masks = {}, {}
    for file in files:
        facts, item = examined.get(str(file.sha256)), file.item
        if item.mask is None or item.problem is not None or not isinstance(facts, ImageFacts):
            continue
        try:
            alpha = item.mask == item.path
            mask = read_mask(read_picture(item) if alpha else item.mask.read_bytes(), alpha=alpha)
            require_use(mask, facts.width, facts.height)
            masks[item.file_name] = store.put(mask_png(mask)).sha256
        except BadInput as error:
            problems[item.file_name] = Problem("mask", f"{item.mask.name}: {error}")
    return [
        replace(file, item=replace(file.item, problem=problems.get(file.item.file_name, file.item.problem)))
        for file in files
    ], masks


def _is_done(store: Store, known: Facts | None, file: ScannedFile) -> bool:
    if isinstance(known, ImageFacts):
        return store.keep(ObjectRef(str(file.sha256), file.bytes))
    return known is not None


def _read(file: ScannedFile) -> bytes | None:
    """The bytes that were scanned, or None where they are too many. Raises DamagedArtifact if they have changed."""
    path = Path(str(file.item.path))
    if file.bytes > MAX_FILE_BYTES:
        return None
    try:
        data = read_picture(file.item)
    except OSError as error:
        raise DamagedArtifact(f"{path}: {error.strerror} since it was scanned; run the same command again") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamagedArtifact(f"{path}: changed while it was being read; run the same command again")
    return data


def _too_large(file: ScannedFile) -> Unreadable:
    return Unreadable(f"the file has {file.bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def _known_facts(bench: Bench, digests: Sequence[str]) -> dict[str, Facts]:
    known: dict[str, Facts] = {}
    with bench.catalog.read() as session:
        for start in range(0, len(digests), INSERT_ROWS):
            query = select(ExaminedImage).where(ExaminedImage.version == EXAMINE_VERSION,
                                                ExaminedImage.sha256.in_(digests[start : start + INSERT_ROWS]))
            known |= {row.sha256: _facts_from_json(row.facts) for row in session.scalars(query)}
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
