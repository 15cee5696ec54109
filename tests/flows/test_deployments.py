"""Schedules: stored as files, kept by a runner, started by the clock or by new pictures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.catalog.models import Snapshot, SnapshotItem
from components.config import Recipe, parse_recipe
from components.curation.sources import hash_files
from components.errors import BadInput
from components.stages import Bench
from components.workspace import Workspace
from flows import deployments, services
from flows.deployments import Trigger, count_new_pictures
from flows.prefect_api import call
from tests.conftest import Served


def recipe_for(folder: Path, name: str = "icons") -> Recipe:
    return parse_recipe({"name": name, "data": {"sources": [{"path": str(folder)}]}}, origin="a test")


@given(st.integers(deployments.SHORTEST_S, 10**7))
def test_a_span_survives_being_written_and_read(seconds: int):
    assert deployments.parse_span(deployments.span_in_words(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("1m", 60), ("6h", 21600), ("1h30m", 5400), ("2w", 1209600)]
)
def test_a_span_is_read_as_a_person_means_it(text: str, seconds: int):
    assert deployments.parse_span(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "6 hours", "-1h", "1h!", "10s", "0m"])
def test_a_span_that_means_nothing_is_refused(text: str):
    with pytest.raises(BadInput, match="--every"):
        deployments.parse_span(text)


@pytest.mark.parametrize("text", ["", "every day", "61 * * * *", "* * * *"])
def test_a_cron_line_that_prefect_would_refuse_is_refused_at_once(text: str):
    with pytest.raises(BadInput, match="--cron"):
        deployments.check_cron(text)


def test_a_schedule_is_stored_replaced_listed_and_removed(workspace: Workspace, tmp_path: Path):
    recipe = recipe_for(tmp_path)
    deployments.store_schedule(workspace, recipe, tmp_path / "r.toml", every="6h")
    deployments.store_schedule(workspace, recipe, tmp_path / "r.toml", cron="0 3 * * *", when_new=50)
    (entry,) = deployments.list_schedules(workspace)
    assert entry.in_words == "cron 0 3 * * *, when 50 pictures are new"
    assert Recipe.model_validate(entry.recipe) == recipe
    with pytest.raises(BadInput, match="there are: icons"):
        deployments.remove_schedule(workspace, "icon")
    deployments.remove_schedule(workspace, "icons")
    assert deployments.list_schedules(workspace) == []


def test_a_schedule_that_never_comes_due_is_refused(workspace: Workspace, tmp_path: Path):
    with pytest.raises(BadInput, match="no schedule given"):
        deployments.store_schedule(workspace, recipe_for(tmp_path), tmp_path / "r.toml")
    with pytest.raises(BadInput, match="--when-new 0"):
        deployments.store_schedule(workspace, recipe_for(tmp_path), tmp_path / "r.toml", when_new=0)


def test_pictures_inside_of_larger_files_are_not_counted_so_a_schedule_on_them_is_refused(
    workspace: Workspace, tmp_path: Path
):
    (tmp_path / "a.tar").write_bytes(b"a tar by its name")
    with pytest.raises(BadInput, match="holds its pictures inside of others; use --every or --cron"):
        deployments.store_schedule(workspace, recipe_for(tmp_path), tmp_path / "r.toml", when_new=5)
    deployments.store_schedule(workspace, recipe_for(tmp_path), tmp_path / "r.toml", every="6h")


def test_what_a_kohya_tree_leaves_out_is_never_new(bench: Bench, tmp_path: Path):
    for name in ("10_sks/a.png", "rest/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    assert count_new_pictures(bench.catalog, "icons", [{"path": str(tmp_path)}]) == 1


def test_a_trigger_waits_for_two_equal_looks_and_fires_once():
    trigger = Trigger(3)
    assert [trigger.fires(count) for count in (0, 2, 3, 5, 5, 5, 0, 0, 4, 4)] == [
        False,
        False,
        False,
        False,
        True,
        False,
        False,
        False,
        False,
        True,
    ]


def test_new_pictures_are_those_that_the_last_snapshot_does_not_hold(bench: Bench, tmp_path: Path):
    folder = (tmp_path / "pictures").resolve()
    (folder / "deeper").mkdir(parents=True)
    names = ["a.png", "b.jpg", "deeper/c.webp"]
    for name in names:
        (folder / name).write_bytes(name.encode())
    (folder / "a.txt").write_text("a caption is no picture")
    sources = [{"path": str(folder)}]
    assert count_new_pictures(bench.catalog, "icons", sources) == 3

    hashed = hash_files(bench.catalog, [folder / name for name in names])
    assert count_new_pictures(bench.catalog, "icons", sources) == 3  # looked at, but in no snapshot
    with bench.catalog.write() as session:
        snapshot = Snapshot(dataset="icons", version=1, digest="d", stage_key="k", kept=3, rejected=0, profile={})
        session.add(snapshot)
        session.flush()
        session.add_all(
            SnapshotItem(
                snapshot_id=snapshot.id,
                ordinal=i,
                file_name=str(path.relative_to(folder)),
                sha256=digest.sha256,
                caption="",
                kept=True,
            )
            for i, (path, digest) in enumerate(hashed.items())
        )
    assert count_new_pictures(bench.catalog, "icons", sources) == 0

    (folder / "d.png").write_bytes(b"new")
    (folder / "a.png").write_bytes(b"changed")
    assert count_new_pictures(bench.catalog, "icons", sources) == 2
    assert count_new_pictures(bench.catalog, "icons", [{"path": str(folder / "gone")}]) == 0


@pytest.mark.services
def test_a_schedule_runs_twice_by_itself_and_new_pictures_start_a_run(served: Served, tmp_path: Path):
    notes, pictures = tmp_path / "notes", tmp_path / "pictures"
    pictures.mkdir()
    variables = (
        os.environ
        | served.environment
        | {
            "NOTES": str(notes),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        }
    )
    log = tmp_path / "runner.log"
    with log.open("wb") as output:
        runner = subprocess.Popen(
            [sys.executable, "-m", "tests.flows.scheduled"],
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: services.beat_file(served.workspace).exists(), 60, log)
        store(served.workspace, recipe_for(pictures, "by-the-clock"), every_s=15)
        store(served.workspace, recipe_for(pictures, "by-the-folder"), when_new=2)
        wait_for(lambda: told(notes).count("by-the-clock") >= 2, 90, log)
        for name in ("one.png", "two.png"):
            (pictures / name).write_bytes(b"picture")
        wait_for(lambda: "by-the-folder" in told(notes), 60, log)
        for name in ("by-the-clock", "by-the-folder"):
            deployments.remove_schedule(served.workspace, name)
        wait_for(lambda: not call(served.urls.prefect_url, "deployments/filter", {}), 30, log)
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(30) == 0, log.read_text()
    finally:
        runner.kill()
    finished = call(
        served.urls.prefect_url,
        "flow_runs/filter",
        {"flows": {"name": {"any_": ["noted"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}},
    )
    assert len(finished) >= 3


def store(workspace: Workspace, recipe: Recipe, *, every_s: int | None = None, when_new: int | None = None) -> None:
    """A schedule with a span shorter than people may ask for."""
    entry = deployments.store_schedule(
        workspace, recipe, Path("r.toml"), every="30s" if every_s else None, when_new=when_new
    )
    path = deployments.schedules_dir(workspace) / f"{entry.name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"every_s": every_s}))


def told(notes: Path) -> list[str]:
    return notes.read_text().split() if notes.exists() else []


def wait_for(condition, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.5)
