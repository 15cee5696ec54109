"""The order in which samples are trained on, as a pure function of (seed, epoch)."""

import hashlib
import heapq
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from itertools import count, islice


@lru_cache(maxsize=256)  # two epochs of every bucket
def epoch_order(seed: int, epoch: int, sample_ids: tuple[str, ...]) -> tuple[int, ...]:
    """Positions into `sample_ids`, permuted by hash; the permutation of the ids does not depend on how they are listed.

    Ids that occur more than once keep their listed order among themselves.
    """
    keys = [hashlib.sha256(f"{seed}/{epoch}/{sample_id}".encode()).digest() for sample_id in sample_ids]
    return tuple(sorted(range(len(sample_ids)), key=lambda i: (keys[i], i)))


def batches_from(
    step: int, sample_ids: Sequence[str], batch_size: int, *, seed: int, buckets: Sequence[Hashable] = ()
) -> Iterator[list[int]]:
    """Endless batches of positions into `sample_ids`, beginning with the batch of `step`.

    A batch holds samples of one bucket, of which none is short: its batch k holds the places k * batch_size to
    (k + 1) * batch_size - 1 of the bucket's concatenated epochs, so every sample is seen once in each of them. Buckets
    take turns by their size, so that samples of all of them are seen as often. Starting at step k yields what an
    unbroken run would have seen there. Without `buckets` all samples share one.
    Raises: ValueError when there are no samples.
    """
    if not sample_ids:
        raise ValueError("no samples to train on")
    members: dict[Hashable, list[int]] = {}
    for position, bucket in enumerate(buckets or [None] * len(sample_ids)):
        members.setdefault(bucket, []).append(position)
    groups = list(members.values())
    ids = [tuple(sample_ids[i] for i in group) for group in groups]
    turns = heapq.merge(
        *(_turns(seed, bucket, index, len(group)) for index, (bucket, group) in enumerate(members.items()))
    )
    for _, index, batch in islice(turns, step, None):
        group, of_group = groups[index], ids[index]
        places = range(batch * batch_size, (batch + 1) * batch_size)
        yield [group[epoch_order(seed, place // len(group), of_group)[place % len(group)]] for place in places]


def _turns(seed: int, bucket: Hashable, index: int, size: int) -> Iterator[tuple[float, int, int]]:
    """When each batch of a bucket is due, growing: once per 1 / size, at a place in that interval drawn by hash."""
    for batch in count():
        digest = hashlib.sha256(f"{seed}/{bucket}/{batch}".encode()).digest()
        yield (batch + int.from_bytes(digest[:4], "big") / 2**32) / size, index, batch
