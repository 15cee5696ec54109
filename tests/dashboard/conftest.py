"""One seeded workspace for all tests of the dashboard that only read it, and a fresh one for those that write."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from components.stages import Bench
from components.workspace import Workspace
from tests.dashboard.seed import Seeded, seed

OUTSIDE = ("SAFELIGHT_CATALOG_URL", "SAFELIGHT_MLFLOW_URI", "SAFELIGHT_REVIEWER", "PREFECT_API_URL")


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Seeded:
    """A workspace with a few weeks of work in it. Do not write to it."""
    return seed(tmp_path_factory.mktemp("filled"), prompts=8)


@pytest.fixture
def writable(filled: Seeded, tmp_path: Path) -> Seeded:
    """A copy of the filled workspace that a test may change."""
    filled.bench.catalog.engine.dispose()  # checkpoints the write-ahead log into the file that is copied
    home = tmp_path / "home"
    shutil.copytree(filled.bench.workspace.home, home)
    return replace(filled, bench=Bench.open(Workspace(home)))


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test sees the developer's own workspace or servers."""
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAFELIGHT_HOME", str(tmp_path / "nothing-here"))
    yield
    assert os.environ["SAFELIGHT_HOME"]
