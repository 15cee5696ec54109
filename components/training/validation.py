"""Fixed-noise validation loss: the same held-out samples, times and noise at every checkpoint, as a ratio to the base.

It says when to stop, not how good the pictures are. Each (sample, time) counts the same: the mean is taken over
log-ratios, since a mean of losses is ruled by the times whose loss is large.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
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
    per_sample: Callable[[Sequence[int], FixedTime], Tensor],
    sample_ids: Sequence[str],
    times: int,
    buckets: Sequence[Hashable] = (),
) -> Tensor:
    """(N, T) float64 losses of every sample at the midpoints of T equal strata of the time distribution.

    `per_sample(positions, draw)` gives the losses (B,) of those samples, which share a bucket; where memory runs out it
    is asked again for halves, and from then on for no more. No global random state is touched.
    Raises: torch.OutOfMemoryError when not even one sample fits.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for position, bucket in enumerate(buckets or [None] * len(sample_ids)):
        members[bucket].append(position)
    losses, size = torch.zeros(len(sample_ids), times, dtype=torch.float64), BATCH
    with torch.no_grad():
        for k in range(times):
            for group in members.values():
                done = 0
                while done < len(group):
                    positions = group[done : done + size]
                    draw = Draw(VALIDATION_SEED, k, tuple(sample_ids[i] for i in positions))
                    piece = _unless_out_of_memory(per_sample, positions, FixedTime(draw, (k + 0.5) / times))
                    if piece is None:
                        torch.cuda.empty_cache()
                        size = len(positions) // 2
                        continue
                    losses[positions, k] = piece.double()
                    done += len(positions)
    return losses


def _unless_out_of_memory(
    per_sample: Callable[[Sequence[int], FixedTime], Tensor], positions: Sequence[int], draw: FixedTime
) -> Tensor | None:
    try:
        return per_sample(positions, draw)
    except torch.OutOfMemoryError:
        if len(positions) == 1:
            raise
        return None


def log_mean_ratio(loss: Tensor, base_loss: Tensor) -> float:
    """exp(mean(log(loss / base_loss))): below 1 is better than the base."""
    return (loss / base_loss).log().mean().exp().item()
