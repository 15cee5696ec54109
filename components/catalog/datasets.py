"""Datasets: snapshots, what is in them, and what the checks said. The queries that flows and dashboard share."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, delete, func, insert, select

from components.catalog.database import Catalog
from components.catalog.models import ExaminedImage, Snapshot, SnapshotItem, Verdict

PAGE_SIZE = 60
QUERY_DIGESTS = 1000  # in one SQL statement


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """An immutable version of a dataset."""

    id: int
    dataset: str
    version: int
    digest: str
    kept: int
    rejected: int
    created_at: datetime
    profile: dict[str, Any]  # counts per split, check and licence; sizes; duplicate groups


@dataclass(frozen=True, slots=True)
class ItemRow:
    """One file of a snapshot, kept or rejected."""

    ordinal: int  # its place in the snapshot; what a page starts after
    file_name: str
    sha256: str | None  # None: its bytes could not be read
    caption: str
    kept: bool
    split: str | None
    group: str | None
    component: str | None
    width: int | None
    height: int | None
    licence: str | None
    author: str | None
    source: str | None


@dataclass(frozen=True, slots=True)
class ItemPage:
    """A stretch of items; `after` continues behind it, None when it is the last."""

    items: tuple[ItemRow, ...]
    after: int | None


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One check's word on one file."""

    ordinal: int
    check: str
    decision: str  # "flag" or "reject"
    score: float | None
    threshold: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Noted:
    """One check's word on one file that is noted once its snapshot is there."""

    decision: str  # "flag" or "reject"
    score: float
    threshold: float
    reason: str
    version: str


@dataclass(frozen=True, slots=True)
class CheckCount:
    """How many files a check flagged or rejected."""

    check: str
    decision: str
    files: int


def list_snapshots(catalog: Catalog, dataset: str | None = None) -> list[SnapshotRow]:
    """Snapshots, newest first, of one dataset or of all."""
    query = select(Snapshot).order_by(Snapshot.id.desc())
    return _snapshots(catalog, query if dataset is None else query.where(Snapshot.dataset == dataset))


def latest_snapshot(catalog: Catalog, dataset: str) -> SnapshotRow | None:
    """The snapshot with the highest version, or None."""
    query = select(Snapshot).where(Snapshot.dataset == dataset).order_by(Snapshot.version.desc()).limit(1)
    return next(iter(_snapshots(catalog, query)), None)


def get_snapshot(catalog: Catalog, snapshot_id: int) -> SnapshotRow | None:
    """One snapshot with its profile, or None."""
    return next(iter(_snapshots(catalog, select(Snapshot).where(Snapshot.id == snapshot_id))), None)


def find_snapshot(catalog: Catalog, dataset: str, digest: str) -> SnapshotRow | None:
    """The snapshot of a dataset whose manifest has this sha256, or None."""
    query = select(Snapshot).where(Snapshot.dataset == dataset, Snapshot.digest == digest)
    return next(iter(_snapshots(catalog, query)), None)


def items_page(catalog: Catalog, snapshot_id: int, *, kept: bool | None = True, split: str | None = None,
               check: str | None = None, after: int = -1, limit: int = PAGE_SIZE) -> ItemPage:
    """Up to `limit` items behind ordinal `after`, in order. `kept` None: both; `check`: only files it spoke of."""
    query = select(SnapshotItem).where(SnapshotItem.snapshot_id == snapshot_id, SnapshotItem.ordinal > after)
    if kept is not None:
        query = query.where(SnapshotItem.kept == kept)
    if split is not None:
        query = query.where(SnapshotItem.split == split, SnapshotItem.kept)
    if check is not None:
        spoken_of = select(Verdict.ordinal).where(Verdict.snapshot_id == snapshot_id, Verdict.check == check)
        query = query.where(SnapshotItem.ordinal.in_(spoken_of))
    with catalog.read() as session:
        found = session.scalars(query.order_by(SnapshotItem.ordinal).limit(limit + 1)).all()
    items = tuple(item_row(item) for item in found[:limit])
    return ItemPage(items, items[-1].ordinal if len(found) > limit else None)


def verdict_counts(catalog: Catalog, snapshot_id: int) -> list[CheckCount]:
    """Files per check and decision, rejections first, then the most frequent."""
    files = func.count(Verdict.ordinal.distinct())
    query = (select(Verdict.check, Verdict.decision, files).where(Verdict.snapshot_id == snapshot_id)
             .group_by(Verdict.check, Verdict.decision)
             .order_by(Verdict.decision.desc(), files.desc(), Verdict.check))
    with catalog.read() as session:
        return [CheckCount(check, decision, number) for check, decision, number in session.execute(query)]


def verdicts_of(catalog: Catalog, snapshot_id: int, ordinals: Collection[int]) -> dict[int, list[VerdictRow]]:
    """The verdicts on a page's items, by ordinal; an item without any is absent."""
    query = (select(Verdict).where(Verdict.snapshot_id == snapshot_id, Verdict.ordinal.in_(ordinals))
             .order_by(Verdict.ordinal, Verdict.id))
    found: dict[int, list[VerdictRow]] = {}
    with catalog.read() as session:
        for row in session.scalars(query):
            verdict = VerdictRow(row.ordinal, row.check, row.decision, row.score, row.threshold, row.reason)
            found.setdefault(row.ordinal, []).append(verdict)
    return found


def note_in_profile(catalog: Catalog, snapshot_id: int, name: str, value: Any) -> None:
    """Write something more that is said of a snapshot under its name; what else its profile says stays."""
    with catalog.write() as session:
        snapshot = session.get_one(Snapshot, snapshot_id)
        snapshot.profile = snapshot.profile | {name: value}


def note_check(catalog: Catalog, snapshot_id: int, check: str, said: Mapping[str, Noted]) -> None:
    """Write what a check says of kept files, by their names, in place of what it said of the snapshot before."""
    kept = select(SnapshotItem.file_name, SnapshotItem.ordinal).where(
        SnapshotItem.snapshot_id == snapshot_id, SnapshotItem.kept)
    with catalog.write() as session:
        session.execute(delete(Verdict).where(Verdict.snapshot_id == snapshot_id, Verdict.check == check))
        rows = [asdict(said[name]) | {"snapshot_id": snapshot_id, "check": check, "ordinal": ordinal}
                for name, ordinal in session.execute(kept) if name in said] if said else []
        if rows:
            session.execute(insert(Verdict), rows)


def find_item(catalog: Catalog, snapshot_id: int, file_name: str) -> ItemRow | None:
    """The file of this name in a snapshot, kept or rejected, or None."""
    query = select(SnapshotItem).where(SnapshotItem.snapshot_id == snapshot_id, SnapshotItem.file_name == file_name)
    with catalog.read() as session:
        item = session.scalar(query)
        return item_row(item) if item is not None else None


def splits_of(catalog: Catalog, snapshot_id: int) -> dict[str, str]:
    """The side of each picture that has one, by the digest of its pixels: of those kept and of dropped duplicates."""
    query = select(SnapshotItem.rgb_digest, SnapshotItem.split).where(
        SnapshotItem.snapshot_id == snapshot_id, SnapshotItem.split.is_not(None), SnapshotItem.rgb_digest.is_not(None))
    with catalog.read() as session:
        return {digest: split for digest, split in session.execute(query) if digest and split}


def splits_of_pictures(catalog: Catalog, snapshot_ids: Sequence[int], digests: Sequence[str]) -> dict[str, str]:
    """The side of each picture, by the digest of its pixels, in the newest of these snapshots that gives it one."""
    found: dict[str, str] = {}
    with catalog.read() as session:
        for start in range(0, len(digests) if snapshot_ids else 0, QUERY_DIGESTS):
            query = select(SnapshotItem.rgb_digest, SnapshotItem.split).join(Snapshot).join(
                ExaminedImage, ExaminedImage.sha256 == SnapshotItem.sha256).where(
                ExaminedImage.rgb_digest.in_(digests[start : start + QUERY_DIGESTS]), SnapshotItem.split.is_not(None),
                SnapshotItem.snapshot_id.in_(snapshot_ids)).order_by(Snapshot.version)
            found |= {digest: split for digest, split in session.execute(query) if digest and split}
    return found


def _snapshots(catalog: Catalog, query: Select[tuple[Snapshot]]) -> list[SnapshotRow]:
    with catalog.read() as session:
        return [SnapshotRow(row.id, row.dataset, row.version, row.digest, row.kept, row.rejected, row.created_at,
                            row.profile) for row in session.scalars(query)]


def item_row(item: SnapshotItem) -> ItemRow:
    side = item.split if item.kept else None
    return ItemRow(item.ordinal, item.file_name, item.sha256, item.caption, item.kept, side, item.group, item.component,
                   item.width, item.height, item.licence, item.author, item.source)
