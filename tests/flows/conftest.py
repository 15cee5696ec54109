"""One small retraining through the command line, which several files look at from different sides."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.workspace import Workspace
from flows import cli
from tests.conftest import Served
from tests.pictures import write_pictures, write_recipe

ROOT = Path(__file__).parents[2]


class Shell:
    """Runs commands in this process and keeps what they said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        code = cli._run(list(arguments))
        self.out, self.err = self.capsys.readouterr()
        return code

    def document(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        assert self(*arguments, "--json") == code, self.err
        document = json.loads(self.out)  # fails unless stdout is one JSON document
        assert document["schema"] == 1
        return document


@pytest.fixture
def shell(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="session")
def trained(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run card of a small recipe, retrained through the command line."""
    from tests.tiny import tiny_stable_diffusion

    folder = tmp_path_factory.mktemp("signs")
    path = write_recipe(
        folder / "recipe.toml", write_pictures(folder / "pictures"), tiny_stable_diffusion(folder / "base"), steps=10
    )
    return safelight(served, "retrain", str(path), "--set", "training.checkpointing_steps=5") | {
        "recipe_path": str(path)
    }


def safelight(served: Served, *arguments: str, code: int = 0) -> dict[str, Any]:
    """A command in a process of its own; its JSON document."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments, "--json"],
        env=os.environ | served.environment,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)
