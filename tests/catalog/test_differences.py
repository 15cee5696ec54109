"""Two versions of a dataset compared: every kind of change is found, and nothing that did not change."""

from pathlib import Path

import pytest

from components.catalog import differences
from components.catalog.differences import KINDS, Difference, compare, named_snapshot, told
from components.errors import BadInput
from components.stages import Bench
from tests.curation.folders import curated, picture, pictures, table


def difference(bench: Bench, before: str, after: str) -> Difference:
    return compare(bench.catalog, named_snapshot(bench.catalog, before), named_snapshot(bench.catalog, after))


def names(found: Difference) -> dict[str, list[str]]:
    """Kind -> file names, without the kinds that nothing is of."""
    by_kind = {kind: [change.file_name for change in found.of_kind(kind)] for kind in KINDS}
    return {kind: files for kind, files in by_kind.items() if files}


def test_each_kind_of_change_is_found_and_the_rest_is_silent(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 12)
    curated(bench, folder)
    pictures(folder, 1, first=20)
    (folder / "000.png").unlink()
    (folder / "000.txt").unlink()
    (folder / "001.txt").write_text("another caption")
    picture(99).save(folder / "002.png")
    for suffix in (".png", ".txt"):
        (folder / f"003{suffix}").rename(folder / f"renamed{suffix}")
    (folder / "004.txt").write_text("")  # an empty caption is a reject
    curated(bench, folder)
    found = difference(bench, "blobs@1", "blobs@2")
    assert names(found) == {
        "added": ["020.png"], "removed": ["000.png"], "renamed": ["renamed.png"], "replaced": ["002.png"],
        "recaptioned": ["001.png", "004.png"], "rejudged": ["004.png"]}
    (rejudged,) = found.of_kind("rejudged")
    assert (told("rejudged", rejudged).before, told("rejudged", rejudged).after) == ("kept", "rejected")
    assert rejudged.reasons and rejudged.reasons[0].check == "caption"
    assert names(difference(bench, "blobs@2", "blobs@1"))["added"] == ["000.png"]


def test_moves_between_splits_and_other_licences_are_told_with_both_sides(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 4)

    def rows(*, moved: str, licence: str) -> list[dict[str, object]]:
        sides = ["test", moved, "test", "train"]
        return [{"file_name": f"{i:03}.png", "text": f"number {i}", "split": sides[i],
                 "licence": licence if i == 2 else "MIT"} for i in range(4)]

    for moved, licence in (("train", "MIT"), ("test", "CC0-1.0")):
        table(folder, rows(moved=moved, licence=licence))
        curated(bench, folder)
    found = difference(bench, "blobs@v1", "blobs")
    assert names(found) == {"moved": ["001.png"], "relicensed": ["002.png"]}
    said = [told(kind, found.of_kind(kind)[0]) for kind in ("moved", "relicensed")]
    assert [(words.before, words.after) for words in said] == [("train", "test"), ("MIT", "CC0-1.0")]


def test_a_score_that_falls_under_a_limit_is_told_with_score_and_threshold(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    picture(9, side=48).save(folder / "small.png")
    (folder / "small.txt").write_text("a small one")
    for min_side in (32, 50):
        curated(bench, folder, min_side=min_side)
    (change,) = difference(bench, "blobs@1", "blobs@2").changes
    (reason,) = change.reasons
    assert (change.file_name, reason.check, reason.score, reason.threshold) == ("small.png", "tiny", 48.0, 50.0)


def test_equal_snapshots_do_not_differ_and_other_datasets_may_be_compared(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    curated(bench, folder)
    curated(bench, folder, dataset="cats@home")
    assert difference(bench, "blobs@1", "cats@home@1").changes == ()


@pytest.mark.parametrize(("name", "says"), [
    ("dogs@1", "no dataset of this workspace; there are: blobs"), ("blobs@9", "no version '9'; there are: 1"),
    ("blobs@", "no version ''"), ("blobs@latest", "no version 'latest'")])
def test_a_version_that_is_not_there_is_told_with_those_that_are(bench: Bench, tmp_path: Path, name: str, says: str):
    curated(bench, pictures(tmp_path / "data", 2))
    with pytest.raises(BadInput, match=says):
        named_snapshot(bench.catalog, name)


def test_of_a_large_dataset_only_what_differs_is_loaded(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = pictures(tmp_path / "data", 30)
    curated(bench, folder)
    (folder / "007.txt").write_text("another caption")
    curated(bench, folder)
    loaded = []
    plain = differences.datasets.item_row
    monkeypatch.setattr(differences.datasets, "item_row", lambda item: loaded.append(item.file_name) or plain(item))
    assert names(difference(bench, "blobs@1", "blobs@2")) == {"recaptioned": ["007.png"]}
    assert loaded == ["007.png", "007.png"]
