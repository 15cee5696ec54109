"""Every optimizer that runs on a CPU on the demo: seconds of CPU a step, peak memory, held-out loss over the base's.

A hundred steps instead of the adapters' fifty: so many take Prodigy from its first guess, 1e-6, to a rate that learns.
"""

from pathlib import Path

import pytest

from components.training.optimizers import OPTIMIZERS
from tests.benchmarks.demo_training import measured

STEPS = ("training.max_train_steps=100", "training.checkpointing_steps=50")
LEARNING_RATES = {  # one that suits each, for the demo's LoRA
    "adamw": 2e-3,
    "adafactor": 0.1,  # relative to the size of the weights
    "prodigy": 1.0,  # a factor on the rate that it finds
    "adamwschedulefree": 4e-3,
    "lion": 3e-4,  # every weight moves by the full rate
    "muon": 2e-3,
}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS.keys() - {"adamw8bit"}))
def test_every_optimizer_learns_the_demo_in_a_hundred_steps(optimizer: str, folder: Path):
    """But for the one that needs a GPU."""
    settings = f"training.optimizer={optimizer}", f"training.learning_rate={LEARNING_RATES[optimizer]}"
    halfway, end = measured(folder, *settings, *STEPS)["validation_ratio"]
    assert end < halfway < 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")
