"""Every kind of adapter on the demo: seconds of CPU a step, peak memory, held-out loss as a ratio to the base's."""

from pathlib import Path

import pytest

from components.training.adapters import KINDS
from tests.benchmarks.demo_training import measured

OF_KIND = {"pissa": ("training.learning_rate=5e-4",)}  # it starts large: a smaller rate


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_the_demo_in_fifty_steps(kind: str, folder: Path):
    halfway, end = measured(folder, f"training.adapter={kind}", *OF_KIND.get(kind, ()))["validation_ratio"]
    assert end < halfway < 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")
