"""The order in which samples are trained on, as a pure function of (seed, epoch)."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, sample_ids: tuple[str, ...]) -> tuple[int, ...]:
    """Positions into `sample_ids`, permuted by hash; the permutation of the ids does not depend on how they are listed.

    Ids that occur more than once keep their listed order among themselves.
    """
    keys = [hashlib.sha256(f"{seed}/{epoch}/{sample_id}".encode()).digest() for sample_id in sample_ids]
    return tuple(sorted(range(len(sample_ids)), key=lambda i: (keys[i], i)))


def batches_from(step: int, sample_ids: Sequence[str], batch_size: int, *, seed: int) -> Iterator[list[int]]:
    """Endless batches of positions into `sample_ids`, beginning with the batch of `step`.

    Batch k holds the places k * batch_size to (k + 1) * batch_size - 1 of the concatenated epochs, so every sample is
    seen once per epoch, no batch is short, and starting at step k yields what an unbroken run would have seen there.
    Raises: ValueError when there are no samples.
    """
    ids = tuple(sample_ids)
    if not ids:
        raise ValueError("no samples to train on")
    while True:
        places = range(step * batch_size, (step + 1) * batch_size)
        yield [epoch_order(seed, place // len(ids), ids)[place % len(ids)] for place in places]
        step += 1
