import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice, pairwise
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from components.diffusion.draws import Draw, Draws
from components.errors import OutOfMemory, StageFailed, TrainingDiverged
from components.training import processes
from components.training.checkpoints import newest_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from components.training.ema import ExponentialAverage
from components.training.gradients import LossScaler, Passes
from components.training.loop import StepReport, fit
from components.training.order import batches_from
from components.training.processes import Processes, joined, started
from components.training.schedules import learning_rate_at

ROOT = Path(__file__).parents[2]
IDS = tuple(f"s{i}" for i in range(10))
DATA = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Rows:
    sample_ids: tuple[str, ...]
    x: Tensor

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.sample_ids[rows], self.x[rows])


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
        self.passes, self.scaler = Passes(), LossScaler()
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
            start_step=self.start_step, max_train_steps=steps, ema=self.ema, passes=self.passes,
            scaler=self.scaler, on_step=self.reports.append, on_checkpoint=self.checkpoint,
            should_stop=should_stop, **more,
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


def test_a_batch_that_does_not_fit_goes_through_in_halves_with_the_same_gradient():
    """The whole batch of 8 fits at first; from step 2 on, in the second batch of a step, only 3 samples do."""
    unbothered, run = Run(), Run()
    seen: list[tuple[int, str]] = []

    def cramped(batch: Rows, draw: Draw) -> Tensor:
        if draw.step >= 2 and draw.earlier and len(batch.sample_ids) > 3:
            raise torch.OutOfMemoryError("tried to allocate")
        seen.extend((draw.step, sample_id) for sample_id in batch.sample_ids)
        return run.loss(batch, draw)

    unbothered.fit(6, batches=rows_from(0, 8), gradient_accumulation_steps=2)
    run.fit(6, batches=rows_from(0, 8), gradient_accumulation_steps=2, loss=cramped)
    assert run.passes.size == 2
    for ours, theirs in zip(run.model.parameters(), unbothered.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [(r.step, r.samples) for r in run.reports] == [(r.step, r.samples) for r in unbothered.reports]
    for ours, theirs in zip(run.reports, unbothered.reports, strict=True):
        assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-5)
    last = [sample_id for batch in islice(rows_from(10, 8), 2) for sample_id in batch.sample_ids]
    assert seen[-16:] == [(5, sample_id) for sample_id in last]


def test_one_sample_that_does_not_fit_ends_the_run_with_what_to_change():
    def full(batch: Rows, draw: Draw) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    said = r"out of memory at step 0 with one sample in a pass \(train_batch_size is 4\); set training.gradient_checkp"
    with pytest.raises(OutOfMemory, match=said) as end:
        Run().fit(6, loss=full)
    assert "\n" not in str(end.value)


def test_a_loss_scale_changes_no_bit_while_nothing_overflows():
    """It is a power of two."""
    plain, scaled = Run(), Run()
    scaled.scaler = LossScaler(enabled=True)
    plain.fit(6)
    scaled.fit(6)
    assert scaled.digest() == plain.digest()
    assert scaled.reports == plain.reports


def overflowing(run: Run) -> Callable[[Rows, Draw], Tensor]:
    """Gradients pass through fp16, whose largest number is 65504: too little for 30 times the first scales."""

    def loss(batch: Rows, draw: Draw) -> Tensor:
        inner = run.loss(batch, draw)
        inner.register_hook(lambda gradient: gradient.half().float())
        return 30 * inner

    return loss


def test_a_step_whose_gradients_overflow_is_skipped_and_counted_and_resumed(tmp_path: Path):
    run = Run()
    run.scaler, before = LossScaler(enabled=True), run.digest()
    run.ema.tensors = {}
    run.fit(20, loss=overflowing(run))
    finite = [math.isfinite(report.grad_norm) for report in run.reports]
    assert run.scaler.skipped == 5  # 2^16 to 2^11
    assert finite == [False] * run.scaler.skipped + [True] * (20 - run.scaler.skipped)
    assert run.digest() != before
    first = Run(tmp_path)
    first.scaler = LossScaler(enabled=True)
    first.fit(2, loss=overflowing(first))
    state = json.loads(json.dumps(first.scaler.state()))
    assert state["skipped"] == 2
    second = Run(tmp_path)
    second.scaler = LossScaler(enabled=True)
    second.scaler.load(state)
    second.fit(20, loss=overflowing(second))
    assert first.reports + second.reports == run.reports
    assert second.scaler.state() == run.scaler.state()


def test_gradients_that_overflow_at_every_scale_end_the_run_in_one_line():
    run = Run()
    run.scaler = LossScaler(enabled=True)
    with pytest.raises(TrainingDiverged, match=r"overflowed in 20 steps in a row, last at step 19 .*'bf16'") as end:
        run.fit(40, loss=lambda batch, draw: infinite_slope(run, batch, draw))
    assert "\n" not in str(end.value)


def infinite_slope(run: Run, batch: Rows, draw: Draw) -> Tensor:
    """A finite loss whose gradient is not."""
    return run.loss(batch, draw) + 1e-30 * next(run.model.parameters()).sub(1).mul(0).sqrt().sum()


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
    with pytest.raises(TrainingDiverged, match="gradient norm is"):
        run.fit(10, loss=lambda batch, draw: infinite_slope(run, batch, draw))


def in_two_processes(rank: int, folder: Path) -> tuple[Run, Run, Run]:
    """What each of two processes does: an unbroken run, one that the second process stops after 7 steps, the rest."""

    def fit_shared(run: Run, processes: Processes, **more) -> Run:
        if not processes.first:
            run.checkpoint = lambda steps: None
        run.fit(20, batches=rows_from(run.start_step * 2), processes=processes, **more)
        return run

    with joined(rank, 2, folder) as processes:
        unbroken = fit_shared(Run(), processes)
        stopped = Run(folder)
        fit_shared(stopped, processes, should_stop=lambda: rank == 1 and len(stopped.reports) == 7)
        processes.any(False)  # by now the first has written its checkpoint
        return unbroken, stopped, fit_shared(Run(folder), processes)


SECOND = """
import sys
from pathlib import Path
from tests.training.test_loop import in_two_processes
in_two_processes(1, Path(sys.argv[1]))
"""


def test_two_processes_train_like_one_with_twofold_accumulation_and_resume_to_the_bit(tmp_path: Path):
    alone = Run()
    alone.fit(20, batches=rows_from(0), gradient_accumulation_steps=2)
    other = subprocess.Popen([sys.executable, "-c", SECOND, tmp_path], cwd=ROOT)
    unbroken, stopped, resumed = in_two_processes(0, tmp_path)
    assert other.wait() == 0
    assert stopped.start_step == 0 and resumed.start_step == 7
    assert resumed.digest() == unbroken.digest()
    assert stopped.reports + resumed.reports == unbroken.reports
    for ours, theirs in zip(unbroken.reports, alone.reports, strict=True):
        assert (ours.step, ours.samples) == (theirs.step, theirs.samples)
        assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-6)
    for ours, theirs in zip(unbroken.model.parameters(), alone.model.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_a_process_that_the_others_wait_for_in_vain_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    with pytest.raises(StageFailed, match="not all of the 2 training processes were there after 1 s"), joined(
        0, 2, tmp_path
    ):
        pass


def test_what_another_process_fails_with_is_raised_in_the_first(tmp_path: Path):
    request = {"stage": "fine-tune", "home": str(tmp_path), "training": {"rank": 0}}
    with (
        pytest.raises(StageFailed, match="fine-tune: ValidationError"),
        started(request, 2, tmp_path / "work", lambda: False),
    ):
        pass


def test_the_other_processes_of_a_training_end_when_the_first_is_killed():
    first = subprocess.Popen([sys.executable, "-c", FIRST], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    other = psutil.Process(int(first.stdout.readline()))
    assert other.is_running()
    first.kill()
    first.wait()
    while not ended(other):  # the test's time limit is the limit
        time.sleep(0.05)


def ended(process: psutil.Process) -> bool:
    """Gone, or dead and not yet reaped by whoever has inherited it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


FIRST = """
import time
from components.training.processes import _worker
with _worker({"stage": "none", "home": "/nowhere"}) as other:
    print(other.process.pid, flush=True)
    time.sleep(600)
"""


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
