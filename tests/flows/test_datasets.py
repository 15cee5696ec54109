"""`diff`, `export-dataset` and `gc` as they are typed: documents, lines for a person, one-line errors."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from components.catalog import runs
from components.catalog.models import Run, now
from components.stages import Bench
from tests.curation.folders import curated, picture, pictures
from tests.flows.conftest import Shell


@pytest.fixture
def folder(bench: Bench, tmp_path: Path) -> Path:
    """Pictures whose second version has one more, one less, and one with another caption."""
    folder = pictures(tmp_path / "data", 12)
    curated(bench, folder, dataset="cats")
    (folder / "000.png").unlink()
    (folder / "000.txt").unlink()
    (folder / "001.txt").write_text("another caption")
    pictures(folder, 13, first=20)
    picture(99, side=16).save(folder / "tiny.png")
    (folder / "tiny.txt").write_text("a tiny one")
    curated(bench, folder, dataset="cats")
    return folder


def test_diff_counts_and_lists_every_change(folder: Path, shell: Shell):
    document = shell.document("diff", "cats@1", "cats@2")
    counts = {kind: count for kind, count in document["counts"].items() if count}
    assert counts == {"added": 14, "removed": 1, "recaptioned": 1}
    assert [len(document[kind]) for kind in counts] == list(counts.values())
    (entry,) = document["recaptioned"]
    assert (entry["before"]["caption"], entry["after"]["caption"]) == ("blobs number 1", "another caption")
    tiny = next(entry for entry in document["added"] if entry["file_name"] == "tiny.png")
    assert tiny["after"]["kept"] is False
    assert [(said["check"], said["score"]) for said in tiny["after"]["verdicts"] if said["decision"] == "reject"] == [
        ("tiny", 16.0)]


def test_diff_shows_a_person_the_first_of_each_kind(folder: Path, shell: Shell):
    assert shell("diff", "cats@1", "cats") == 0
    assert "added 14" in shell.out and "and 4 more; --json has them all" in shell.out
    assert "another caption" in shell.out
    assert shell("diff", "cats@2", "cats@2") == 0 and "no file differs" in shell.out


def test_a_version_or_folder_that_cannot_be_used_is_one_line(folder: Path, shell: Shell, tmp_path: Path):
    assert "there are: 2, 1" in shell.document("diff", "cats@1", "cats@3", code=2)["error"]
    assert "there are: cats" in shell.document("export-dataset", "dogs", "--out", str(tmp_path / "x"), code=2)["error"]
    assert "holds something already" in shell.document("export-dataset", "cats", "--out", str(folder), code=2)["error"]


def test_export_dataset_says_what_it_wrote(folder: Path, shell: Shell, tmp_path: Path):
    document = shell.document("export-dataset", "cats@1", "--out", str(tmp_path / "out"))
    assert sum(split["samples"] for split in document["splits"].values()) == 12
    assert Path(document["card"]).read_text(encoding="utf-8").startswith("---\nlicense: unknown\n")
    assert shell("export-dataset", "cats@2", "--out", str(tmp_path / "other")) == 0
    assert "train" in shell.out and str(tmp_path / "other") in shell.out


# the store ----------------------------------------------------------------------------------------------------------


def leave(bench: Bench, data: bytes, days: float) -> Path:
    path = bench.store.path(bench.store.put(data).sha256)
    os.utime(path, (time.time() - 86400 * days,) * 2)
    return path


def test_gc_counts_and_deletes_only_when_told_to(folder: Path, bench: Bench, shell: Shell):
    old, young = leave(bench, b"old", 40), leave(bench, b"young", 3)
    document = shell.document("gc")
    assert document["dry_run"] and document["unreachable"] == {
        "objects": 1, "bytes": 3, "kinds": {"other": {"objects": 1, "bytes": 3}}}
    assert document["young"]["kinds"]["other"]["objects"] == 1
    assert document["reachable"]["kinds"]["pictures"]["objects"] == 26
    assert shell("gc", "--dry-run") == 0 and "`safelight gc --yes` deletes them" in shell.out
    assert old.exists()
    assert shell.document("gc", "--yes")["deleted"] == {"objects": 1, "bytes": 3}
    assert not old.exists() and young.exists()
    assert shell.document("gc", "--yes", "--older-than", "2d")["deleted"] == {"objects": 1, "bytes": 5}
    assert shell("gc") == 0 and "nothing to delete" in shell.out
    assert shell("export-dataset", "cats@1", "--out", str(folder.parent / "after")) == 0


def test_what_a_living_run_may_have_put_stays_however_short_the_span(bench: Bench, shell: Shell):
    uid = runs.open_run(bench.catalog, name="long", kind="retrain", recipe={}, git_commit=None)
    with bench.catalog.write() as session:
        run = session.get(Run, uid)
        assert run is not None
        run.created_at = now() - timedelta(days=5)
    during, before = leave(bench, b"during", 4), leave(bench, b"before", 6)
    document = shell.document("gc", "--yes", "--older-than", "1h")
    assert document["running"] == [uid] and during.exists() and not before.exists()
    runs.close_run(bench.catalog, uid, "completed")
    assert shell.document("gc", "--yes", "--older-than", "1h")["deleted"]["objects"] == 1


@pytest.mark.parametrize(("arguments", "says"), [
    (["--older-than", "soon"], "--older-than 'soon': expected a span"),
    (["--older-than", "5m"], "--older-than '5m': expected at least 1h"),
    (["--dry-run", "--yes"], "--dry-run counts and --yes deletes")])
def test_a_span_that_is_none_or_too_short_is_refused(shell: Shell, arguments: list[str], says: str):
    assert says in shell.document("gc", *arguments, code=2)["error"]
