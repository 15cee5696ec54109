import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from components.diffusion.draws import Draw, Draws
from components.errors import TrainingDiverged
from components.training.checkpoints import newest_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from components.training.ema import ExponentialAverage
from components.training.loop import StepReport, fit
from components.training.order import batches_from
from components.training.schedules import learning_rate_at

IDS = tuple(f"s{i}" for i in range(10))
DATA = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Rows:
    sample_ids: tuple[str, ...]
    x: Tensor


def rows_from(step: int, batch_size: int = 4) -> Iterator[Rows]:
    for index in batches_from(step, IDS, batch_size, seed=0):
        yield Rows(tuple(IDS[i] for i in index), DATA[index])


class Run:
    """A tiny regression with noise in its loss, so that a wrong draw or a wrong order shows in the weights."""

    def __init__(self, folder: Path | None = None):
        torch.manual_seed(0)
        self.folder = folder
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.ema = ExponentialAverage(self.model.named_parameters(), 0.9)
        self.reports: list[StepReport] = []
        self.start_step = 0
        if folder and (checkpoint := newest_checkpoint(folder)):
            self.model.load_state_dict(checkpoint.tensors["model"])
            self.ema.load(checkpoint.tensors["ema"])
            restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"])
            self.start_step = checkpoint.step

    def loss(self, batch: Rows, draw: Draw) -> Tensor:
        noise = draw.normal(batch.x.shape)
        return (self.model(batch.x + 0.1 * noise) - batch.x.flip(-1)).square().mean()

    def checkpoint(self, steps: int) -> None:
        if self.folder:
            tensors = {
                "model": self.model.state_dict(),
                "ema": self.ema.tensors,
                "optimizer": optimizer_tensors(self.optimizer),
            }
            save_checkpoint(self.folder, steps, tensors, {})

    def fit(
        self, steps: int, *, should_stop: Callable[[], bool] = lambda: False, loss=None, batches=None, **more
    ) -> int:
        return fit(
            list(self.model.parameters()), batches or rows_from(self.start_step), loss or self.loss, self.optimizer,
            learning_rate_at("cosine", 1e-2, max_train_steps=30, warmup_steps=5), draws=Draws(0),
            start_step=self.start_step, max_train_steps=steps, ema=self.ema, on_step=self.reports.append,
            on_checkpoint=self.checkpoint, should_stop=should_stop, **more,
        )  # fmt: skip

    def digest(self) -> str:
        tensors = [*self.model.state_dict().values(), *self.ema.tensors.values()]
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def test_training_lowers_the_loss_and_reports_every_step():
    run = Run()
    assert run.fit(30) == 30
    assert [report.step for report in run.reports] == list(range(30))
    assert sum(r.loss for r in run.reports[-5:]) < 0.8 * sum(r.loss for r in run.reports[:5])
    assert all(report.samples == 4 for report in run.reports)


def test_a_run_stopped_and_resumed_ends_with_the_bits_of_an_unbroken_one(tmp_path: Path):
    unbroken = Run()
    unbroken.fit(20)
    stopped = Run(tmp_path)
    assert stopped.fit(20, should_stop=lambda: len(stopped.reports) == 7) == 7
    resumed = Run(tmp_path)
    assert resumed.start_step == 7
    resumed.fit(20)
    assert resumed.digest() == unbroken.digest()
    assert stopped.reports + resumed.reports == unbroken.reports


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps(tmp_path: Path):
    unbroken = Run()
    unbroken.fit(20)
    killed = Run(tmp_path)

    def power_cut(batch: Rows, draw: Draw) -> Tensor:
        if draw.step == 13:
            raise KeyboardInterrupt
        return killed.loss(batch, draw)

    with pytest.raises(KeyboardInterrupt):
        killed.fit(20, loss=power_cut, checkpointing_steps=5)
    resumed = Run(tmp_path)
    assert resumed.start_step == 10
    resumed.fit(20)
    assert resumed.digest() == unbroken.digest()


def test_two_accumulated_batches_are_one_batch_of_twice_the_size():
    whole, halves = Run(), Run()
    whole.fit(6, batches=rows_from(0, 8))
    halves.fit(6, batches=rows_from(0, 4), gradient_accumulation_steps=2)
    for ours, theirs in zip(halves.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [r.samples for r in halves.reports] == [8] * 6
    for ours, theirs in zip(halves.reports, whole.reports, strict=True):
        assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change_and_names_step_and_samples():
    run, reference = Run(), Run()
    reference.fit(3)

    def diverging(batch: Rows, draw: Draw) -> Tensor:
        return run.loss(batch, draw) * (math.nan if draw.step == 3 else 1)

    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 3 \(samples s\d, s\d, s\d, s\d\)"):
        run.fit(10, loss=diverging)
    assert run.digest() == reference.digest()


def test_a_gradient_that_is_not_finite_stops_too():
    run = Run()

    def infinite_slope(batch: Rows, draw: Draw) -> Tensor:
        return run.loss(batch, draw) + 1e-30 * next(run.model.parameters()).sub(1).mul(0).sqrt().sum()

    with pytest.raises(TrainingDiverged, match="gradient norm is"):
        run.fit(10, loss=infinite_slope)


def test_checkpoints_come_at_their_interval_and_at_the_end():
    run, steps = Run(), []
    run.checkpoint = steps.append
    run.fit(12, checkpointing_steps=5)
    assert steps == [5, 10, 12]


def test_nothing_is_done_when_all_steps_are_done():
    run, steps = Run(), []
    run.checkpoint = steps.append
    run.start_step = 20
    assert run.fit(20) == 20
    assert not run.reports and not steps


def test_large_gradients_are_clipped_and_reported_unclipped():
    run = Run()
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
    run.fit(1, loss=lambda batch, draw: 1e3 * run.loss(batch, draw), max_grad_norm=0.5)
    after = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert run.reports[0].grad_norm > 100
    assert math.isclose((after - before).norm().item(), 0.5 * run.reports[0].learning_rate, rel_tol=1e-3)


def test_the_average_follows_its_recurrence_and_can_be_lent_to_the_model():
    model = nn.Linear(1, 1, bias=False)
    ema = ExponentialAverage(model.named_parameters(), decay=0.5)
    expected = model.weight.item()
    for step in range(4):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.item()
    live = model.weight.item()
    assert math.isclose(ema.tensors["weight"].item(), expected, rel_tol=1e-6)
    with ema.applied():
        assert math.isclose(model.weight.item(), expected, rel_tol=1e-6)
    assert model.weight.item() == live


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_floor(name: str):
    lr_at = learning_rate_at(name, 2.0, max_train_steps=100, warmup_steps=10, floor=0.1)
    rates = [lr_at(step) for step in range(101)]
    assert math.isclose(rates[0], 0.2) and math.isclose(rates[9], 2.0) and math.isclose(rates[10], 2.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert math.isclose(rates[55], 2.0 * (0.1 + 0.9 * 0.5)) and math.isclose(rates[100], 0.2)


def test_a_constant_learning_rate_stays_and_an_unknown_schedule_is_refused():
    assert learning_rate_at("constant", 3.0, max_train_steps=10)(9) == 3.0
    with pytest.raises(ValueError, match="choose from constant, cosine, linear"):
        learning_rate_at("step", 3.0, max_train_steps=10)
