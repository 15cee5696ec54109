from pathlib import Path

import pytest
import torch
from torch import nn

from components.config import TrainingConfig
from components.errors import DamagedArtifact
from components.training.checkpoints import (
    load_checkpoint,
    newest_checkpoint,
    optimizer_numbers,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from components.training.optimizers import OPTIMIZERS

TENSORS = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "optimizer": {"0.step": torch.tensor(3.0)}}


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path):
    save_checkpoint(tmp_path, 100, TENSORS, {"seed": 7})
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.facts) == (100, {"seed": 7})
    assert torch.equal(checkpoint.tensors["model"]["weight"], TENSORS["model"]["weight"])
    assert torch.equal(checkpoint.tensors["optimizer"]["0.step"], torch.tensor(3.0))


def test_there_is_no_newest_checkpoint_in_an_empty_folder(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_checkpoint(tmp_path, 100, TENSORS, {})
    damaged = save_checkpoint(tmp_path, 200, TENSORS, {}) / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 100
    assert "model.safetensors: sha256 is" in caplog.text
    with pytest.raises(DamagedArtifact, match="resume from an older checkpoint"):
        load_checkpoint(damaged.parent)


@pytest.mark.parametrize("missing", ["manifest.json", "optimizer.safetensors"])
def test_an_incomplete_checkpoint_is_not_resumed(tmp_path: Path, missing: str):
    save_checkpoint(tmp_path, 100, TENSORS, {})
    (save_checkpoint(tmp_path, 200, TENSORS, {}) / missing).unlink()
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 100


def test_what_a_killed_save_left_behind_is_no_checkpoint_and_is_replaced(tmp_path: Path):
    partial = tmp_path / ".step-00000100.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 100, TENSORS, {})
    assert newest_checkpoint(tmp_path) is not None
    assert not partial.exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path):
    for step in (100, 200, 300):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000200", "step-00000300"]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw8bit"])
def test_a_restored_optimizer_steps_like_the_one_it_was_taken_from(name: str, tmp_path: Path):
    training = TrainingConfig(optimizer=name, learning_rate=1.0 if name == "prodigy" else 0.1)

    def step(model: nn.Linear, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = OPTIMIZERS[name](list(model.named_parameters()), training)
    for _ in range(3):
        step(model, optimizer, x)
    facts = {"optimizer": optimizer_numbers(optimizer)}
    save_checkpoint(tmp_path, 3, {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}, facts)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    twin = nn.Linear(3, 2)
    twin.load_state_dict(checkpoint.tensors["model"])
    restored = OPTIMIZERS[name](list(twin.named_parameters()), training)
    restore_optimizer(restored, checkpoint.tensors["optimizer"], checkpoint.facts["optimizer"])
    for _ in range(3):
        step(model, optimizer, x)
        step(twin, restored, x)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)
    assert optimizer_numbers(restored) == optimizer_numbers(optimizer)
    states = optimizer_tensors(restored)
    assert all(torch.equal(states[key], value) for key, value in optimizer_tensors(optimizer).items())
