"""What changed between two snapshots: files added, removed, renamed or replaced, and what is said of the others."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, except_, select

from components.catalog import datasets
from components.catalog.database import Catalog
from components.catalog.datasets import ItemRow, SnapshotRow, VerdictRow
from components.catalog.models import Snapshot, SnapshotItem
from components.errors import BadInput

QUERY_ITEMS = 500  # ordinals in one SQL statement
COMPARED = (  # what makes an item another one; the pixels' digest says the same as the bytes'
    SnapshotItem.file_name, SnapshotItem.sha256, SnapshotItem.caption, SnapshotItem.kept, SnapshotItem.split,
    SnapshotItem.licence, SnapshotItem.author, SnapshotItem.source)


@dataclass(frozen=True, slots=True)
class Change:
    """A file that is not the same in both snapshots, with what the checks said of it; None: it is not there."""

    before: ItemRow | None
    after: ItemRow | None
    verdicts_before: tuple[VerdictRow, ...]
    verdicts_after: tuple[VerdictRow, ...]

    @property
    def file_name(self) -> str:
        """Its name now, or the last it had."""
        item = self.after or self.before
        assert item is not None
        return item.file_name

    @property
    def reasons(self) -> tuple[VerdictRow, ...]:
        """Why it is rejected now, or was before."""
        now, then = ([verdict for verdict in said if verdict.decision == "reject"]
                     for said in (self.verdicts_after, self.verdicts_before))
        return tuple(now or then)


def _pair(changed: Callable[[ItemRow, ItemRow], bool]) -> Callable[[Change], bool]:
    def of(change: Change) -> bool:
        return change.before is not None and change.after is not None and changed(change.before, change.after)

    return of


KINDS: dict[str, Callable[[Change], bool]] = {  # a file that is there in both may be of several
    "added": lambda change: change.before is None,
    "removed": lambda change: change.after is None,
    "renamed": _pair(lambda a, b: a.file_name != b.file_name),
    "replaced": _pair(lambda a, b: a.sha256 != b.sha256),
    "recaptioned": _pair(lambda a, b: a.caption != b.caption),
    "rejudged": _pair(lambda a, b: a.kept != b.kept),
    "moved": _pair(lambda a, b: a.kept and b.kept and a.split != b.split),
    "relicensed": _pair(lambda a, b: (a.licence, a.author, a.source) != (b.licence, b.author, b.source)),
}


@dataclass(frozen=True, slots=True)
class Told:
    """A change of one kind in words: what stood there, what stands there now, and why; "" where there is nothing."""

    before: str
    after: str
    why: str


WORDS: dict[str, Callable[[ItemRow], str]] = {  # what a kind of change is about
    "added": lambda item: item.caption,
    "removed": lambda item: item.caption,
    "renamed": lambda item: item.file_name,
    "replaced": lambda item: (item.sha256 or "unreadable")[:12],
    "recaptioned": lambda item: item.caption,
    "rejudged": lambda item: "kept" if item.kept else "rejected",
    "moved": lambda item: item.split or "",
    "relicensed": lambda item: ", ".join(filter(None, (item.licence, item.author, item.source))) or "not stated",
}


def told(kind: str, change: Change) -> Told:
    """What a change is as one of KINDS."""
    before, after = (WORDS[kind](item) if item else "" for item in (change.before, change.after))
    reasons = change.reasons if kind in ("added", "removed", "rejudged") else ()
    return Told(before, after, "; ".join(f"{reason.check}: {reason.reason}" for reason in reasons))


@dataclass(frozen=True, slots=True)
class Difference:
    """The changes from one snapshot to another, sorted by file name."""

    before: SnapshotRow
    after: SnapshotRow
    changes: tuple[Change, ...]

    def of_kind(self, kind: str) -> tuple[Change, ...]:
        """The changes of one of KINDS."""
        return tuple(change for change in self.changes if KINDS[kind](change))


def named_snapshot(catalog: Catalog, name: str) -> SnapshotRow:
    """The snapshot that DATASET@VERSION means; DATASET alone: its newest. Raises BadInput, naming those there are."""
    dataset, at, version = name.rpartition("@") if "@" in name else (name, "", "")
    versions = datasets.list_snapshots(catalog, dataset)
    if not versions:
        with catalog.read() as session:
            known = ", ".join(session.scalars(select(Snapshot.dataset).distinct().order_by(Snapshot.dataset)))
        raise BadInput(f"{dataset!r} is no dataset of this workspace; there are: {known or 'none'}")
    if not at:
        return max(versions, key=lambda row: row.version)
    for row in versions:
        if version.removeprefix("v") == str(row.version):
            return row
    there = ", ".join(str(row.version) for row in versions)
    raise BadInput(f"{dataset} has no version {version!r}; there are: {there}")


def compare(catalog: Catalog, before: SnapshotRow, after: SnapshotRow) -> Difference:
    """What changed. A file is told by name and bytes, where both are not to be found by its bytes, then by its name.

    Only what differs is loaded, so that a large dataset with few changes is compared quickly.
    """
    old, new = _differing(catalog, before.id, after.id), _differing(catalog, after.id, before.id)
    pairs = list(_matched(old, new))
    said = [_verdicts(catalog, snapshot, [item.ordinal for item in items])
            for snapshot, items in ((before.id, old), (after.id, new))]
    changes = [
        Change(a, b, *(tuple(verdicts.get(item.ordinal, ())) if item else ()
                       for item, verdicts in zip((a, b), said, strict=True)))
        for a, b in pairs]
    return Difference(before, after, tuple(sorted(changes, key=lambda change: change.file_name)))


def _differing(catalog: Catalog, snapshot: int, other: int) -> list[ItemRow]:
    """The items of a snapshot that the other does not hold in the same way, in order."""
    def rows(of: int) -> Select[Any]:
        return select(*COMPARED).where(SnapshotItem.snapshot_id == of)

    only = except_(rows(snapshot), rows(other)).subquery()
    names = select(only.c.file_name)
    query = (select(SnapshotItem).where(SnapshotItem.snapshot_id == snapshot, SnapshotItem.file_name.in_(names))
             .order_by(SnapshotItem.ordinal))
    with catalog.read() as session:
        return [datasets.item_row(item) for item in session.scalars(query)]


def _matched(old: Sequence[ItemRow], new: Sequence[ItemRow]) -> Iterator[tuple[ItemRow | None, ItemRow | None]]:
    """Pairs by name and bytes, then by bytes, then by name; at last what is left alone."""
    left, right = {item.ordinal: item for item in old}, {item.ordinal: item for item in new}
    keys: tuple[Callable[[ItemRow], tuple[object, ...] | None], ...] = (
        lambda item: (item.file_name, item.sha256),
        lambda item: (item.sha256,) if item.sha256 else None,
        lambda item: (item.file_name,))
    for key in keys:
        waiting: dict[tuple[object, ...], list[ItemRow]] = {}
        for item in right.values():
            if (found := key(item)) is not None:
                waiting.setdefault(found, []).append(item)
        for item in list(left.values()):
            if (found := key(item)) is not None and waiting.get(found):
                twin = waiting[found].pop(0)
                yield left.pop(item.ordinal), right.pop(twin.ordinal)
    yield from ((item, None) for item in left.values())
    yield from ((None, item) for item in right.values())


def _verdicts(catalog: Catalog, snapshot: int, ordinals: Collection[int]) -> dict[int, list[VerdictRow]]:
    wanted, found = list(ordinals), {}
    for start in range(0, len(wanted), QUERY_ITEMS):
        found |= datasets.verdicts_of(catalog, snapshot, wanted[start : start + QUERY_ITEMS])
    return found
