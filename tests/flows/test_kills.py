"""kill -9 of a whole retraining at moments in different stages: the same command then ends with the same adapter."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from components.catalog import runs
from components.catalog.database import Catalog
from components.workspace import Workspace
from tests.conftest import Served
from tests.soak import kills

MOMENTS = ("cache", "fine-tune", "evaluate")
PATIENCE_S = 240.0
SETTINGS = ("--set", "training.checkpointing_steps=5", "--set", "name=killed")


@pytest.fixture
def home(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace of its own that uses the session's servers."""
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SAFELIGHT_OWN_PREFECT", raising=False)  # for this workspace both servers are somebody else's
    monkeypatch.setenv("SAFELIGHT_MLFLOW_URI", served.urls.mlflow_url)
    monkeypatch.setenv("SAFELIGHT_HOME", str(tmp_path / "killed"))
    return tmp_path / "killed"


def kill_in(stage: str, home: Path, recipe: str) -> None:
    """Start the command and SIGKILL its process group as soon as the catalog says that it is in `stage`."""
    process = subprocess.Popen(
        kills.command("retrain", recipe, *SETTINGS, "--json"),
        env=os.environ | {"SAFELIGHT_HOME": str(home)}, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)  # fmt: skip
    catalog, deadline = Catalog(Workspace(home).catalog_url), time.monotonic() + PATIENCE_S
    while not _in_stage(catalog, home, stage):
        assert process.poll() is None, f"the run ended before it reached {stage}"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.wait()


def _in_stage(catalog: Catalog, home: Path, stage: str) -> bool:
    if not (home / "catalog.db").exists():
        return False
    try:
        return any(run.progress.get("stage") == stage for run in runs.running(catalog))
    except Exception:  # the tables are being made
        return False


def _run(home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"SAFELIGHT_HOME": str(home)}
    return subprocess.run(
        kills.command(*words), env=environment, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.mark.services
@pytest.mark.timeout(1500)  # five runs
def test_a_run_killed_in_stage_after_stage_ends_with_the_bytes_of_an_undisturbed_one(
    trained: dict[str, Any], home: Path
):
    for stage in MOMENTS:
        kill_in(stage, home, trained["recipe_path"])
        assert kills.left_running(home) == []
    done = _run(home, "retrain", trained["recipe_path"], *SETTINGS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"]["sha256"] == trained["adapter"]["sha256"]
    _run(home, "doctor", "--fix", "--json")
    assert runs.running(Catalog(Workspace(home).catalog_url)) == []
    shutil.rmtree(home, ignore_errors=True)
