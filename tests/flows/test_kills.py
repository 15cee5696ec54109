"""kill -9 of a whole retraining at moments in different stages: the same command then ends with the same adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Served
from tests.soak import kills

MOMENTS = ("cache", "fine-tune", "evaluate")
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


@pytest.mark.services
@pytest.mark.timeout(1500)  # five runs
def test_a_run_killed_in_stage_after_stage_ends_with_the_bytes_of_an_undisturbed_one(
    trained: dict[str, Any], home: Path
):
    for stage in MOMENTS:
        kills.kill_in(stage, home, "retrain", trained["recipe_path"], *SETTINGS, "--json")
        assert kills.left_running(home) == []
    done = kills.answer(home, "retrain", trained["recipe_path"], *SETTINGS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"]["sha256"] == trained["adapter"]["sha256"]
    kills.answer(home, "doctor", "--fix", "--json")
    assert kills.stages_running(home) == []
    shutil.rmtree(home, ignore_errors=True)
