"""Queries over snapshots: versions, pages by key, verdicts."""

from pathlib import Path

import pytest

from components.catalog import datasets
from components.catalog.database import Catalog
from components.catalog.models import Base, Snapshot, SnapshotItem, Verdict

KEPT, REJECTED = 25, 5


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.db'}")
    Base.metadata.create_all(catalog.engine)
    return catalog


def add_snapshot(catalog: Catalog, dataset: str = "icons", version: int = 1) -> int:
    """KEPT pictures, every fifth in test, then REJECTED ones; every third is flagged dark."""
    with catalog.write() as session:
        snapshot = Snapshot(dataset=dataset, version=version, digest=f"{version:064}", stage_key="k", kept=KEPT,
                            rejected=REJECTED, profile={"splits": {"train": 20, "test": 5}})
        session.add(snapshot)
        session.flush()
        for i in range(KEPT + REJECTED):
            kept = i < KEPT
            split = ("test" if i % 5 == 0 else "train") if kept else None
            session.add(SnapshotItem(snapshot_id=snapshot.id, ordinal=i, file_name=f"{i}.png", sha256=f"{i}",
                                     caption=f"c{i}", rgb_digest=f"rgb-{i}", kept=kept, split=split, group="g",
                                     component="c"))
            if not kept:
                session.add(Verdict(snapshot_id=snapshot.id, ordinal=i, check="tiny", decision="reject", score=3.0,
                                    threshold=64.0, reason="small"))
            if i % 3 == 0:
                session.add(Verdict(snapshot_id=snapshot.id, ordinal=i, check="dark", decision="flag", reason="dark"))
        return snapshot.id


def ordinals(page: datasets.ItemPage) -> list[int]:
    return [item.ordinal for item in page.items]


def test_snapshots_are_listed_newest_first_for_one_dataset_or_all(catalog: Catalog):
    for dataset, version in (("a", 1), ("b", 1), ("a", 2)):
        add_snapshot(catalog, dataset, version)
    assert [(row.dataset, row.version) for row in datasets.list_snapshots(catalog)] == [("a", 2), ("b", 1), ("a", 1)]
    assert [row.version for row in datasets.list_snapshots(catalog, "a")] == [2, 1]


def test_a_snapshot_is_found_by_id_by_digest_and_as_the_latest(catalog: Catalog):
    first, second = add_snapshot(catalog, version=1), add_snapshot(catalog, version=2)
    latest, found = datasets.latest_snapshot(catalog, "icons"), datasets.find_snapshot(catalog, "icons", f"{1:064}")
    assert latest is not None and latest.id == second
    assert found is not None and found.id == first
    one = datasets.get_snapshot(catalog, first)
    assert one is not None and one.profile == {"splits": {"train": 20, "test": 5}} and one.created_at.tzinfo is not None


def test_what_is_not_there_is_none_or_empty(catalog: Catalog):
    assert datasets.latest_snapshot(catalog, "icons") is None
    assert datasets.get_snapshot(catalog, 1) is None
    assert datasets.items_page(catalog, 1) == datasets.ItemPage((), None)
    assert datasets.verdict_counts(catalog, 1) == [] and datasets.verdicts_of(catalog, 1, [0]) == {}


def test_pages_by_key_walk_through_every_kept_item_once(catalog: Catalog):
    snapshot, seen, after = add_snapshot(catalog), [], -1
    while after is not None:
        page = datasets.items_page(catalog, snapshot, after=after, limit=10)
        seen += ordinals(page)
        after = page.after
    assert seen == list(range(KEPT))


@pytest.mark.parametrize(("filters", "expected"), [
    ({"kept": False}, [25, 26, 27, 28, 29]), ({"split": "test"}, [0, 5, 10, 15, 20]), ({"check": "tiny"}, []),
    ({"check": "tiny", "kept": None}, [25, 26, 27, 28, 29]), ({"check": "dark", "split": "test"}, [0, 15]),
    ({"kept": None, "after": 27}, [28, 29])])
def test_pages_are_filtered_by_decision_split_and_check(catalog: Catalog, filters: dict, expected: list[int]):
    page = datasets.items_page(catalog, add_snapshot(catalog), **filters)
    assert (ordinals(page), page.after) == (expected, None)


def test_verdicts_are_counted_per_check_rejections_first(catalog: Catalog):
    assert datasets.verdict_counts(catalog, add_snapshot(catalog)) == [
        datasets.CheckCount("tiny", "reject", 5), datasets.CheckCount("dark", "flag", 10)]


def test_a_pages_verdicts_come_by_ordinal(catalog: Catalog):
    found = datasets.verdicts_of(catalog, add_snapshot(catalog), [26, 27, 1])
    checks = {ordinal: [row.check for row in rows] for ordinal, rows in found.items()}
    assert checks == {26: ["tiny"], 27: ["tiny", "dark"]}
    assert found[26] == [datasets.VerdictRow(26, "tiny", "reject", 3.0, 64.0, "small")]


def test_a_dropped_duplicates_side_is_known_and_not_shown(catalog: Catalog):
    snapshot = add_snapshot(catalog)
    with catalog.write() as session:
        item = session.get_one(SnapshotItem, (snapshot, KEPT))
        item.rgb_digest, item.split = "rgb-twin", "test"
    assert datasets.splits_of(catalog, snapshot)["rgb-twin"] == "test"
    assert KEPT not in ordinals(datasets.items_page(catalog, snapshot, kept=None, split="test"))
    (shown,) = datasets.items_page(catalog, snapshot, kept=False, limit=1).items
    assert (shown.ordinal, shown.split) == (KEPT, None)


def test_the_sides_of_kept_pictures_are_known_by_their_pixels(catalog: Catalog):
    sides = datasets.splits_of(catalog, add_snapshot(catalog))
    assert len(sides) == KEPT and sides["rgb-5"] == "test" and sides["rgb-6"] == "train"
