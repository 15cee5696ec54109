"""The gradient of one step: accumulated over batches, shared among processes, in smaller passes where memory is short.

Whatever of these is in use, a step sees the same samples with the same draws, and its gradient is that of the mean loss
over all of them, up to the order of floating-point sums.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from components.diffusion.draws import Draw, Draws
from components.errors import OutOfMemory, TrainingDiverged
from components.training.processes import Processes

MAX_OVERFLOWS = 20  # skipped steps in a row; from the first scale, 2^16, they lead below 1
log = logging.getLogger(__name__)


class Batch(Protocol):
    """Anything with one id per sample that can be cut; only the loss knows the rest, and may load it only then."""

    @property
    def sample_ids(self) -> Sequence[str]: ...

    def __getitem__(self, rows: slice, /) -> Self: ...


B = TypeVar("B", bound=Batch)


class Passes:
    """How many samples go through the model at once: the whole batch, until memory runs out, then half as many."""

    def __init__(self, size: int | None = None):
        self.size = size  # None: whole batches; goes into checkpoints, since sums of other passes round differently

    def halve(self, batch_size: int, step: int) -> None:
        """Raises OutOfMemory when one sample is already too much."""
        size = min(self.size or batch_size, batch_size)
        if size == 1:
            raise OutOfMemory(
                f"out of memory at step {step} with one sample in a pass (train_batch_size is {batch_size}); set"
                " training.gradient_checkpointing = true, or lower training.resolution or training.rank"
            )
        self.size = size // 2
        log.warning(
            "out of memory at step %d with %d samples in a pass: it goes on with %d, the batch stays %d; "
            "a smaller train_batch_size with more gradient_accumulation_steps saves the failed pass",
            *(step, size, self.size, batch_size),
        )


class LossScaler:
    """Keeps fp16 gradients from vanishing: the loss times a scale that falls when they overflow and grows again.

    A step whose gradients overflow is skipped and counted; without fp16 nothing is scaled and nothing may overflow.
    """

    def __init__(self, device: str = "cpu", *, enabled: bool = False):
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)
        self.skipped = 0
        self._in_a_row = 0

    def scale(self, loss: Tensor) -> Tensor:
        return self._scaler.scale(loss)

    def step(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float, where: str) -> float:
        """Clip and step; returns the gradients' norm before clipping, or inf for a step that was skipped.

        Raises: TrainingDiverged, naming `where`, when they are not finite, with fp16 after `MAX_OVERFLOWS` in a row.
        """
        self._scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        if math.isfinite(grad_norm):
            self._scaler.step(optimizer)
            self._in_a_row = 0
        elif self._scaler.is_enabled():
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row >= MAX_OVERFLOWS:
                raise TrainingDiverged(
                    f"fp16 gradients overflowed in {self._in_a_row} steps in a row, last at {where}, at loss scale"
                    f" {self._scaler.get_scale():g}; set mixed_precision to 'bf16' or 'no', or lower learning_rate"
                )
        else:
            _require_finite("gradient norm", grad_norm, where)
        self._scaler.update()
        return grad_norm if math.isfinite(grad_norm) else math.inf

    def state(self) -> dict[str, Any]:
        """As JSON, for checkpoints."""
        return {"scaler": self._scaler.state_dict(), "skipped": self.skipped, "in_a_row": self._in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint of the same setting."""
        self._scaler.load_state_dict(state["scaler"])
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]


class Gradients(Generic[B]):
    """`gradients(step, batches)` leaves the mean gradient of a step in `.grad` of the parameters.

    Batch k of a step belongs to process k modulo their number. Draws know the step and the sample, not the process.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        loss: Callable[[B, Draw], Tensor],
        draws: Draws,
        *,
        passes: Passes,
        scaler: LossScaler,
        processes: Processes,
    ):
        self._parameters, self._loss, self._draws = parameters, loss, draws
        self._passes, self._scaler, self._processes = passes, scaler, processes

    def __call__(self, step: int, batches: Sequence[B]) -> float:
        """The mean loss over `batches`, of equal size. Raises: TrainingDiverged, OutOfMemory."""
        while (mean := self._accumulated(step, batches)) is None:  # outside its handler, so that memory is free
            torch.cuda.empty_cache()
            self._passes.halve(len(batches[0].sample_ids), step)
        self._processes.sum_in_place([p.grad for p in self._parameters if p.grad is not None])
        return self._processes.sum(mean)

    def _accumulated(self, step: int, batches: Sequence[B]) -> float | None:
        """This process's part of the mean; None when memory ran out."""
        for parameter in self._parameters:
            parameter.grad = None
        total, earlier = 0.0, []
        try:
            for place, batch in enumerate(batches):
                if place % self._processes.count == self._processes.rank:
                    total += self._backward(batch, self._draws(step, batch.sample_ids, earlier), len(batches))
                earlier += batch.sample_ids
        except torch.OutOfMemoryError:
            return None
        return total

    def _backward(self, batch: B, draw: Draw, batches: int) -> float:
        samples, total = len(batch.sample_ids), 0.0
        size = min(self._passes.size or samples, samples)
        for start in range(0, samples, size):
            part = batch if size == samples else batch[start : start + size]
            loss = self._loss(part, draw.rows(start, start + len(part.sample_ids)))
            _require_finite("loss", loss.item(), f"step {draw.step} (samples {listed(part.sample_ids)})")
            share = batches * samples / len(part.sample_ids)
            self._scaler.scale(loss / share).backward()
            total += loss.item() / share
        return total


def _require_finite(what: str, value: float, where: str) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"the {what} is {value} at {where}; "
            "look at these samples, or lower learning_rate and resume from the last checkpoint"
        )


def listed(sample_ids: Sequence[str]) -> str:
    """The first of them and how many more: enough to look at, short enough for one line."""
    return ", ".join(sample_ids[:8]) + (f" and {len(sample_ids) - 8} more" if len(sample_ids) > 8 else "")
