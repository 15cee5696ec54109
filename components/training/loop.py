"""The one training loop: it pre-trains the autoencoder and the denoiser, and fine-tunes adapters."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from components.diffusion.draws import Draw, Draws
from components.errors import TrainingDiverged
from components.training.ema import ExponentialAverage
from components.training.schedules import LearningRate


class Batch(Protocol):
    """Anything with one id per sample; only the loss knows the rest."""

    @property
    def sample_ids(self) -> Sequence[str]: ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did; `step` counts from 0."""

    step: int
    loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    samples: int


def fit(
    parameters: Sequence[nn.Parameter],
    batches: Iterator[B],
    loss: Callable[[B, Draw], Tensor],
    optimizer: Optimizer,
    lr_at: LearningRate,
    *,
    draws: Draws,
    max_train_steps: int,
    start_step: int = 0,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0,
    ema: ExponentialAverage | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_checkpoint: Callable[[int], None] = lambda steps: None,
    checkpointing_steps: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train `parameters` in place from `start_step` until `max_train_steps` steps are done; returns the steps done.

    `batches` begins with the first batch of `start_step` and yields `gradient_accumulation_steps` batches a step;
    `loss(batch, draw)` is a scalar, the mean over its samples. `on_checkpoint(steps)` is called after every
    `checkpointing_steps` steps, at the end, and before returning early because `should_stop()` is true.
    Raises: TrainingDiverged at the first loss or gradient that is not finite, before the parameters change.
    """
    step = start_step
    while step < max_train_steps and not should_stop():
        learning_rate = set_learning_rate(optimizer, lr_at(step))
        optimizer.zero_grad(set_to_none=True)
        total, sample_ids = 0.0, []
        for _ in range(gradient_accumulation_steps):
            batch = next(batches)
            batch_loss = loss(batch, draws(step, batch.sample_ids, sample_ids))
            _require_finite("loss", batch_loss.item(), step, batch.sample_ids)
            (batch_loss / gradient_accumulation_steps).backward()
            total += batch_loss.item() / gradient_accumulation_steps
            sample_ids += batch.sample_ids
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        _require_finite("gradient norm", grad_norm, step, sample_ids)
        optimizer.step()
        if ema is not None:
            ema.update(step)
        on_step(StepReport(step, total, grad_norm, learning_rate, len(sample_ids)))
        step += 1
        if checkpointing_steps and step % checkpointing_steps == 0 and step < max_train_steps:
            on_checkpoint(step)
    if step > start_step:
        on_checkpoint(step)
    return step


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> float:
    """Give every parameter group the learning rate, times its own `lr_ratio` where it has one; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
    return learning_rate


def _require_finite(what: str, value: float, step: int, sample_ids: Sequence[str]) -> None:
    if not math.isfinite(value):
        shown = ", ".join(sample_ids[:8]) + (f" and {len(sample_ids) - 8} more" if len(sample_ids) > 8 else "")
        raise TrainingDiverged(
            f"the {what} is {value} at step {step} (samples {shown}); "
            "look at these samples, or lower learning_rate and resume from the last checkpoint"
        )
