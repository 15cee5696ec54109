"""The one training loop: it pre-trains the autoencoder and the denoiser, and fine-tunes adapters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor, nn
from torch.optim import Optimizer

from components.diffusion.draws import Draw, Draws
from components.heap import keep_freed_memory
from components.training.ema import ExponentialAverage
from components.training.gradients import B, Gradients, LossScaler, Passes, listed
from components.training.processes import ALONE, Processes
from components.training.schedules import LearningRate


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did; `step` counts from 0."""

    step: int
    loss: float
    grad_norm: float  # before clipping; inf: fp16 overflowed and the step was skipped
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
    passes: Passes | None = None,
    scaler: LossScaler | None = None,
    processes: Processes = ALONE,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_checkpoint: Callable[[int], None] = lambda steps: None,
    checkpointing_steps: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train `parameters` in place from `start_step` until `max_train_steps` steps are done; returns the steps done.

    `batches` begins with the first batch of `start_step` and yields `gradient_accumulation_steps` batches a step for
    each of the `processes`; `loss(batch, draw)` is a scalar, the mean over its samples. `passes` and `scaler` change
    with the steps and belong into checkpoints. `on_checkpoint(steps)` is called after every `checkpointing_steps`
    steps, at the end, and before returning early because `should_stop()` is true in any process.
    Raises: TrainingDiverged at the first loss or gradient that is not finite, before the parameters change;
    OutOfMemory when not even one sample fits.
    """
    if parameters[0].device.type == "cpu":
        keep_freed_memory()
    scaler = scaler or LossScaler()
    gradients = Gradients(parameters, loss, draws, passes=passes or Passes(), scaler=scaler, processes=processes)
    step = start_step
    while step < max_train_steps and not processes.any(should_stop()):
        learning_rate = set_learning_rate(optimizer, lr_at(step))
        step_batches = list(islice(batches, gradient_accumulation_steps * processes.count))
        sample_ids = [sample_id for batch in step_batches for sample_id in batch.sample_ids]
        mean_loss = gradients(step, step_batches)
        where = f"step {step} (samples {listed(sample_ids)})"
        grad_norm = scaler.step(optimizer, parameters, max_grad_norm, where)
        if ema is not None:
            ema.update(step)
        on_step(StepReport(step, mean_loss, grad_norm, learning_rate, len(sample_ids)))
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
