"""Random draws as pure functions of (seed, step, sample id, purpose).

No generator is carried along: what one sample draws in one step depends neither on its neighbours in the batch nor on
what was drawn before, so a resumed run repeats an unbroken one, and worker count and batch order change nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """The randomness of one batch in one step; row i belongs to `sample_ids[i]`."""

    seed: int
    step: int
    sample_ids: tuple[str, ...]
    earlier: tuple[str, ...] = ()  # samples of this step's batches before this one, when gradients are accumulated
    stratified: tuple[str, ...] = ()  # purposes whose uniform numbers lie one in each of B equal strata, in order
    place: int = 0  # of the first row in its batch, when these are `rows` of one
    batch_size: int | None = None  # of that batch; None: this is all of it

    def normal(self, shape: Sequence[int], purpose: str = "noise") -> Tensor:
        """Standard normal numbers of `shape` (B, ...), float32 on the CPU, where B = len(sample_ids).

        Raises: ValueError when the first dimension is not the batch size.
        """
        self._check(shape[0])
        return torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in self._generators(purpose)])

    def uniform(self, size: int, purpose: str = "time") -> Tensor:
        """(B,) float64 numbers strictly between 0 and 1. Raises: ValueError when `size` is not the batch size."""
        self._check(size)
        unit = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators(purpose)])
        if purpose in self.stratified:
            stratum = torch.arange(self.place, self.place + size, dtype=unit.dtype)
            unit = (stratum + unit) / (self.batch_size or size)
        return unit.clamp(2**-53, 1 - 2**-53)

    def rows(self, start: int, stop: int) -> "Draw":
        """The draw of rows `start` to `stop - 1` alone: the same numbers as in the whole batch."""
        return replace(
            self,
            sample_ids=self.sample_ids[start:stop],
            earlier=self.earlier + self.sample_ids[:start],
            place=self.place + start,
            batch_size=self.batch_size or len(self.sample_ids),
        )

    def _check(self, size: int) -> None:
        if size != len(self.sample_ids):
            raise ValueError(f"asked to draw for {size} samples, but the batch has {len(self.sample_ids)}")

    def _generators(self, purpose: str) -> list[torch.Generator]:
        seen = Counter(self.earlier)
        generators = []
        for sample_id in self.sample_ids:
            key = f"{self.seed}/{self.step}/{purpose}/{sample_id}"
            if seen[sample_id]:  # a small data set fills a batch with repeats, which must not draw the same noise
                key += f"/{seen[sample_id]}"
            seen[sample_id] += 1
            digest = hashlib.sha256(key.encode()).digest()
            generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little")))
        return generators


@dataclass(frozen=True, slots=True)
class Draws:
    """All the randomness of a training run: `draws(step, sample_ids)` is the `Draw` of one batch.

    `earlier` are the samples of the step's batches before this one; only those that come again draw differently.
    A stratified number depends on the sample's place in its batch, and batches are functions of seed and step.
    """

    seed: int
    stratified: tuple[str, ...] = ()

    def __call__(self, step: int, sample_ids: Sequence[str], earlier: Sequence[str] = ()) -> Draw:
        return Draw(self.seed, step, tuple(sample_ids), tuple(earlier), self.stratified)
