"""Fixed-noise validation loss: the same held-out samples, times and noise at every checkpoint, as a ratio to the base.

It says when to stop, not how good the pictures are. Each (sample, time) counts the same: the mean is taken over
log-ratios, since a mean of losses is ruled by the times whose loss is large.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.diffusion.draws import Draw

VALIDATION_SEED = 1_000_003  # apart from every training seed that a person would pick
BATCH = 48  # samples in one forward pass


@dataclass(frozen=True, slots=True)
class FixedTime:
    """A `Draw` whose uniform numbers are all `u`, so that a whole pass sits at one time."""

    draw: Draw
    u: float

    def normal(self, shape: Sequence[int], purpose: str = "noise") -> Tensor:
        return self.draw.normal(shape, purpose)

    def uniform(self, size: int, purpose: str = "time") -> Tensor:
        return torch.full((size,), self.u, dtype=torch.float64)


def validation_losses(
    per_sample: Callable[[Sequence[int], FixedTime], Tensor], sample_ids: Sequence[str], times: int
) -> Tensor:
    """(N, T) float64 losses of every sample at the midpoints of T equal strata of the time distribution.

    `per_sample(positions, draw)` gives the losses (B,) of those samples. No global random state is touched.
    """
    columns = []
    with torch.no_grad():
        for k in range(times):
            pieces = []
            for start in range(0, len(sample_ids), BATCH):
                positions = range(start, min(start + BATCH, len(sample_ids)))
                draw = Draw(VALIDATION_SEED, k, tuple(sample_ids[i] for i in positions))
                pieces.append(per_sample(positions, FixedTime(draw, (k + 0.5) / times)).double())
            columns.append(torch.cat(pieces))
    return torch.stack(columns, dim=1)


def log_mean_ratio(loss: Tensor, base_loss: Tensor) -> float:
    """exp(mean(log(loss / base_loss))): below 1 is better than the base."""
    return (loss / base_loss).log().mean().exp().item()
