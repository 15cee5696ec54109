"""Bad input and broken surroundings, met by the real command: a line or a verdict, and sources stay as they were."""

import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.catalog import datasets, runs
from components.stages import Bench
from components.workspace import Workspace
from flows import processes, services
from flows.tracking.recovery import pending
from tests.conftest import Served
from tests.curation.folders import tree_digest
from tests.curation.test_snapshots import header_only_png
from tests.disks import small_disk
from tests.flows.conftest import Shell, safelight
from tests.pictures import draw, write_pictures
from tests.soak import kills

DATA = 'name = "signs"\n[[data.sources]]\npath = "pictures"\n'


def recipe(folder: Path, body: str = DATA) -> str:
    """A recipe beside five good pictures; what is wrong with them is up to the case."""
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures", shapes=1, held_out=0)
    (folder / "recipe.toml").write_text(body)
    return str(folder / "recipe.toml")


def emptied(folder: Path) -> str:
    path = recipe(folder)
    shutil.rmtree(folder / "pictures")
    (folder / "pictures").mkdir()
    return path


UNUSABLE: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no folder": (lambda f: [recipe(f, DATA.replace("pictures", "pitcures"))], "pitcures: no such folder; pass"),
    "a file for a folder": (lambda f: [recipe(f, DATA.replace("pictures", "recipe.toml"))], "is a file, expected a"),
    "an empty folder": (lambda f: [emptied(f)], "holds nothing; expected pictures"),
    "a misspelt key": (lambda f: [recipe(f, DATA + "[training]\nrnak = 4")], "'training.rnak', did you mean 'rank'?"),
    "a misspelt section": (lambda f: [recipe(f), "--set", "trainig.rank=4"], "'trainig', did you mean 'training'?"),
    "a base that is no pipeline": (lambda f: [recipe(f), "--set", f"base.model={f}"], "is no diffusers pipeline; give"),
    "a base that is not there": (lambda f: [recipe(f), "--set", f"base.model={f}/x"], "no such folder and no hub id"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_used_is_refused_before_a_server_is_started(
    shell: Shell, workspace: Workspace, tmp_path: Path, case: str
):
    make, said = UNUSABLE[case]
    arguments = make(tmp_path)
    before = tree_digest(tmp_path / "pictures")
    assert shell("retrain", *arguments) == 2
    assert shell.out == "" and shell.err.count("\n") == 1 and said in shell.err
    assert tree_digest(tmp_path / "pictures") == before
    assert not workspace.services_file.exists() and not list(workspace.logs.iterdir())


def test_an_error_that_cannot_be_written_down_is_still_one_line(shell: Shell, workspace: Workspace, monkeypatch):
    def fail(_: Workspace) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("flows.services.status", fail)
    (workspace.logs / "safelight.log").mkdir()  # as good as a disk that takes nothing
    assert shell("status") == 1
    assert shell.err.count("\n") == 1 and "ZeroDivisionError" in shell.err and "details: not kept" in shell.err


def test_a_full_disk_in_a_database_is_said_like_any_other(shell: Shell, workspace: Workspace, monkeypatch):
    def fail(_: Workspace) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("flows.services.status", fail)
    assert shell("status") == 1
    assert f"{workspace.home}: no space left in it" in shell.err and shell.err.count("\n") == 1


# against real servers ---------------------------------------------------------------------------------------------


def spoil(folder: Path) -> dict[str, str]:
    """Add seven files that cannot become samples; returns what is said of each."""
    whole = (folder / "disc-red.png").read_bytes()
    vast = header_only_png(100_000)
    for name, data in {"cut": whole[: len(whole) // 2], "zero": b"", "letter": b"Dear all,\n", "vast": vast}.items():
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text("a sign")
    for name, caption in {"unspoken": b" \n", "latin": "gr\u00fcn".encode("cp1252")}.items():
        draw("arch", "grey", 40).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(caption)
    draw("arch", "grey", 40).save(folder / "mute.png")
    return {
        "cut.png": "cut short or damaged",
        "zero.png": "the file is empty (0 bytes)",
        "letter.png": "not a PNG, JPEG,",
        "vast.png": "10000000000 pixels",
        "unspoken.png": "unspoken.txt: the caption is empty; write one",
        "latin.png": "latin.txt: byte 0xfc at offset 2 is not UTF-8; save the file as UTF-8",
        "mute.png": "no caption; write mute.txt beside it",
    }


def verdicts(bench: Bench, dataset: str) -> dict[str, str]:
    """The reasons of the newest snapshot's rejected files."""
    snapshot = datasets.latest_snapshot(bench.catalog, dataset)
    assert snapshot is not None
    rejected = datasets.items_page(bench.catalog, snapshot.id, kept=False).items
    said = datasets.verdicts_of(bench.catalog, snapshot.id, [item.ordinal for item in rejected])
    return {item.file_name: said[item.ordinal][0].reason for item in rejected}


@pytest.mark.services
def test_damaged_files_become_verdicts_and_the_folder_stays_as_it_was(
    served: Served, trained: dict[str, Any], tmp_path: Path
):
    folder = write_pictures(tmp_path / "pictures", shapes=2, held_out=1)
    expected = spoil(folder)
    before = tree_digest(folder)
    arguments = (trained["recipe_path"], "--data", str(folder), "--set", "name=damaged")
    card = safelight(served, "curate", *arguments)
    assert card["status"] == "completed"
    assert (card["snapshot"]["kept"], card["snapshot"]["rejected"]) == (10, len(expected))
    reasons = verdicts(Bench.open(served.workspace), "damaged")
    assert reasons.keys() == expected.keys()
    assert {name: reason for name, reason in reasons.items() if expected[name] not in reason} == {}
    assert tree_digest(folder) == before
    planned = safelight(served, "plan", *arguments)
    assert [stage["reused"] for stage in planned["stages"] if stage["name"] == "curate"] == [True]


@pytest.fixture
def elsewhere(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's servers as a team's, used from another workspace."""
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SAFELIGHT_OWN_PREFECT")
    monkeypatch.setenv("SAFELIGHT_MLFLOW_URI", served.urls.mlflow_url)


@pytest.mark.services
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_once_there_is_room(
    elsewhere: None, trained: dict[str, Any], tmp_path: Path
):
    folder = Path(trained["recipe_path"]).parent / "pictures"
    before = tree_digest(folder)
    with small_disk(tmp_path / "home", kilobytes=600) as disk:  # the catalog fits, the pictures do not
        stopped = kills.answer(disk.path, "curate", trained["recipe_path"])
        assert stopped.returncode == 1 and disk.free < 100_000
        *_, line = stopped.stderr.splitlines()
        assert line.startswith(f"error: {disk.path}") and "no space left" in line and "Traceback" not in stopped.stderr
        assert tree_digest(folder) == before
        disk.resize(64_000)
        done = kills.answer(disk.path, "curate", trained["recipe_path"], "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["snapshot"]["digest"] == trained["snapshot"]["digest"]


def training(progress: dict[str, Any]) -> bool:
    return progress.get("stage") == "fine-tune" and progress.get("done", 0) > 0


@pytest.mark.services
@pytest.mark.timeout(900)  # two servers start anew
def test_a_run_outlives_its_servers_and_tells_them_everything_when_they_are_back(
    served: Served, trained: dict[str, Any]
):
    changes = ("name=outlived", "training.max_train_steps=60", "training.checkpointing_steps=60")
    settings = [word for change in changes for word in ("--set", change)]
    with subprocess.Popen(
        kills.command("retrain", trained["recipe_path"], *settings, "--json"),
        env=os.environ | served.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        bench = Bench.open(served.workspace)
        while not any(run.name == "outlived" and training(run.progress) for run in runs.running(bench.catalog)):
            assert command.poll() is None
            time.sleep(0.05)
        marked = processes.marked_processes(served.workspace)
        for server in [*marked["mlflow"], *marked["prefect"]]:
            server.kill()
        out, err = command.communicate(timeout=600)
    assert command.returncode == 0, err
    assert "Traceback" not in err
    card = json.loads(out)
    assert card["status"] == "completed" and "challenger" in card["model"]["aliases"]
    assert services.ensure_up(served.workspace) == served.urls
    assert pending(bench) == []
