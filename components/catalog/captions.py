"""Captions that no source holds: versions that people wrote for a dataset, and those of captioners. Append-only."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from components.catalog.database import Catalog
from components.catalog.models import StoredCaption

Tag = tuple[str, float, str]  # the tag, its score in [0, 1], its category
QUERIED = 500  # digests in one SQL statement
ANY_DATASET = ""  # of a model's captions, which say nothing but what is to be seen


@dataclass(frozen=True, slots=True)
class CaptionVersion:
    """One version of a picture's caption, as its author wrote it."""

    sha256: str
    dataset: str
    author: str
    kind: str
    text: str
    tags: tuple[Tag, ...] = ()
    source: str = ""
    revision: str = ""
    prompt: str = ""
    prompt_hash: str = ""
    version: int = 0  # from 1, within author, revision and prompt; given when it is stored
    created_at: datetime | None = None

    @property
    def by(self) -> str:
        """Who wrote it, as a manifest keeps it."""
        return f"{self.author}@{self.revision[:12]}" if self.revision else self.author


def store(catalog: Catalog, captions: Sequence[CaptionVersion]) -> list[CaptionVersion]:
    """Write all of them or none; each becomes the next version of its author, revision and prompt."""
    with catalog.write() as session:
        rows = []
        for caption in captions:
            rows.append(_row(caption, _newest_version(session, caption) + 1))
            session.add(rows[-1])
            session.flush()
        return [_version(row) for row in rows]


def edits(catalog: Catalog, dataset: str) -> dict[str, CaptionVersion]:
    """What people wrote last of a dataset's pictures, by sha256; where they took it back there is nothing."""
    query = select(StoredCaption).where(StoredCaption.dataset == dataset, StoredCaption.kind == "person")
    with catalog.read() as session:
        newest = {row.sha256: _version(row) for row in session.scalars(query.order_by(StoredCaption.id))}
    return {sha256: caption for sha256, caption in newest.items() if caption.text}


def of_captioners(catalog: Catalog, digests: Collection[str]) -> dict[str, list[CaptionVersion]]:
    """What captioners wrote of these pictures, by sha256, the newest first."""
    found: dict[str, list[CaptionVersion]] = {}
    with catalog.read() as session:
        for some in _chunks(digests):
            query = select(StoredCaption).where(StoredCaption.sha256.in_(some), StoredCaption.kind != "person")
            for row in session.scalars(query.order_by(StoredCaption.id.desc())):
                found.setdefault(row.sha256, []).append(_version(row))
    return found


def captioned_by(catalog: Catalog, digests: Collection[str], author: str, revision: str) -> set[tuple[str, str]]:
    """(sha256, prompt hash) of what a captioner of this revision has captioned before."""
    known: set[tuple[str, str]] = set()
    with catalog.read() as session:
        for some in _chunks(digests):
            query = select(StoredCaption.sha256, StoredCaption.prompt_hash).where(
                StoredCaption.sha256.in_(some), StoredCaption.author == author, StoredCaption.revision == revision
            )
            known |= {(sha256, prompt_hash) for sha256, prompt_hash in session.execute(query)}
    return known


def history(catalog: Catalog, dataset: str, sha256: str) -> list[CaptionVersion]:
    """Every stored version of a picture's caption that counts in a dataset, the newest first."""
    query = select(StoredCaption).where(
        StoredCaption.sha256 == sha256, StoredCaption.dataset.in_((dataset, ANY_DATASET))
    )
    with catalog.read() as session:
        return [_version(row) for row in session.scalars(query.order_by(StoredCaption.id.desc()))]


def _newest_version(session: Session, caption: CaptionVersion) -> int:
    query = select(func.max(StoredCaption.version)).where(
        StoredCaption.sha256 == caption.sha256,
        StoredCaption.dataset == caption.dataset,
        StoredCaption.author == caption.author,
        StoredCaption.revision == caption.revision,
        StoredCaption.prompt_hash == caption.prompt_hash,
    )
    return session.scalar(query) or 0


def _row(caption: CaptionVersion, version: int) -> StoredCaption:
    return StoredCaption(
        sha256=caption.sha256,
        dataset=caption.dataset,
        author=caption.author,
        kind=caption.kind,
        source=caption.source,
        revision=caption.revision,
        prompt=caption.prompt,
        prompt_hash=caption.prompt_hash,
        version=version,
        text=caption.text,
        tags=[list(tag) for tag in caption.tags],
    )


def _version(row: StoredCaption) -> CaptionVersion:
    tags = tuple((str(tag), float(score), str(category)) for tag, score, category in row.tags)
    return CaptionVersion(
        row.sha256,
        row.dataset,
        row.author,
        row.kind,
        row.text,
        tags,
        row.source,
        row.revision,
        row.prompt,
        row.prompt_hash,
        row.version,
        row.created_at,
    )


def _chunks(digests: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(digests)
    yield from (ordered[start : start + QUERIED] for start in range(0, len(ordered), QUERIED))
