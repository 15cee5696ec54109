"""The latent cache: what the base's encoders make of pictures and captions, kept by content and read by sample id.

Nothing stale can be read, a change of 1 % of a dataset costs 1 % of the encoding, and going back to an earlier state
costs nothing: `keys.py` says why. Several processes that want the same items share the work: see `leases.py` and
`pieces.py`; `crews.py` starts such processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.curation.pixels import decode
from components.errors import TrainingDiverged
from components.latents.ahead import ahead
from components.latents.buckets import fit
from components.latents.keys import Item
from components.latents.leases import Leases
from components.latents.pieces import Pieces
from components.latents.ragged import Tensors, shortened
from components.latents.reading import Held
from components.stages import Bench
from components.storage import Store

MICRO_BATCH = 8  # always full, padded with the last item: bits then depend neither on order nor on neighbours
LEASE_ITEMS = 64  # what a killed process has encoded in vain, at most


Encode = Callable[[list[Any]], Tensors]  # of a micro-batch's inputs, a row of each tensor for each of them
Prepare = Callable[[Item], Any]  # makes an item's input


def encode_missing(
    bench: Bench,
    encoder: str,
    items: Sequence[Item],
    encode: Encode,
    on_progress: Callable[[int], None],
    *,
    prepare: Prepare = lambda item: item,
) -> int:
    """Encode the items that nobody has encoded yet; returns how many this process encoded. Then all are in shards.

    `encode` gets what `prepare` makes of a micro-batch's items; `prepare` runs ahead of it, in threads. Items that
    others have leased are left to them and waited for at the end, or taken over where their process has died.
    Raises TrainingDiverged, naming the picture's file or the caption, when what would be kept is not finite.
    """
    unique = {item.key: item for item in items}
    held = Held(bench, encoder)
    missing = without(unique.values(), held(list(unique)))
    on_progress(len(unique) - len(missing))
    encoded = 0
    while missing:
        pieces = Pieces(bench, encoder, held)
        encoded += encode_pieces(bench, encoder, missing, encode, on_progress, prepare, held, pieces.seal_full)
        pieces.seal(set(unique))
        missing = without(unique.values(), held(list(unique)))  # none, unless a piece was damaged
    return encoded


def encode_pieces(
    bench: Bench,
    encoder: str,
    items: Sequence[Item],
    encode: Encode,
    on_progress: Callable[[int], None],
    prepare: Prepare,
    held: Held,
    on_lease: Callable[[], None] = lambda: None,
) -> int:
    """Encode those of the items that are in no piece and no shard yet; returns how many. Then all are in one.

    `on_lease` is called whenever a lease of them is done.
    """
    missing, encoded = list(items), 0
    with Leases(bench.workspace.locks / "encoding.lock", encoder) as leases:
        work = _Work(leases, Pieces(bench, encoder, held), held, on_progress, on_lease)
        while missing:
            encoded += work.encode(missing, encode, prepare)
            if missing := work.left_to_others:
                leases.wait(missing[0].key)
    return encoded


@dataclass(frozen=True, slots=True)
class _Batch:
    """A micro-batch and the lease that it belongs to, whose last one `ends` it."""

    items: list[Item]
    lease: list[str]
    ends: bool


class _Work:
    """Passes over items of which others may have some."""

    def __init__(
        self,
        leases: Leases,
        pieces: Pieces,
        held: Held,
        on_progress: Callable[[int], None],
        on_lease: Callable[[], None],
    ):
        self._leases, self._pieces, self._held = leases, pieces, held
        self._on_progress, self._on_lease = on_progress, on_lease
        self.left_to_others: list[Item] = []

    def encode(self, items: Sequence[Item], encode: Encode, prepare: Prepare) -> int:
        """Encode those of the items that are free and not encoded; returns how many that were."""
        count = 0
        rows: list[tuple[str, Tensors]] = []
        for batch, inputs in ahead(self._batches(items), lambda batch: [prepare(item) for item in batch.items]):
            rows += _encoded(batch.items, inputs, encode)
            self._on_progress(len(batch.items))
            count += len(batch.items)
            if batch.ends:
                self._pieces.write(rows)
                self._leases.release(batch.lease)
                rows = []
                self._on_lease()
        return count

    def _batches(self, items: Sequence[Item]) -> Iterator[_Batch]:
        self.left_to_others = []
        for lease in self._leased(items):
            keys = [item.key for item in lease]
            done = self._pieces.keys()  # before the catalog is asked: a piece goes when its rows have come
            todo = without(lease, done | self._held(keys))
            self._on_progress(len(lease) - len(todo))
            if not todo:
                self._leases.release(keys)
            for start in range(0, len(todo), MICRO_BATCH):
                yield _Batch(todo[start : start + MICRO_BATCH], keys, start + MICRO_BATCH >= len(todo))

    def _leased(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        lease: list[Item] = []
        for item in items:
            (lease if self._leases.take(item.key) else self.left_to_others).append(item)
            if len(lease) == LEASE_ITEMS:
                yield lease
                lease = []
        if lease:
            yield lease


def without(items: Iterable[Item], keys: set[str]) -> list[Item]:
    return [item for item in items if item.key not in keys]


def _encoded(items: list[Item], inputs: list[Any], encode: Encode) -> Iterator[tuple[str, Tensors]]:
    padded = inputs + [inputs[-1]] * (MICRO_BATCH - len(inputs))
    tensors = shortened({name: tensor[: len(items)] for name, tensor in encode(padded).items()})
    _require_finite(items, tensors)
    for i, item in enumerate(items):
        yield item.key, {name: tensor[i] for name, tensor in tensors.items()}


def _require_finite(batch: list[Item], tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor).flatten(1).all(1)
        if not finite.all():
            bad = [
                item.file_name or item.bytes_sha256 or f"the caption {item.caption[:80]!r}"
                for item, good in zip(batch, finite.tolist(), strict=True)
                if not good
            ]
            raise TrainingDiverged(
                f"{', '.join(bad[:3])}: the base's encoder gives a {name} that is not finite as {tensor.dtype}; "
                "leave these out of the data, or repair the base"
            )


def picture_of(store: Store, item: Item) -> Tensor:
    """A decoded, bucketed picture (H, W, 3) uint8."""
    assert item.placement is not None
    return torch.from_numpy(np.array(fit(decode(store.read(item.bytes_sha256)), item.placement, item.background)))


def normalised(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures of one size as encoders take them: (B, 3, H, W) float32 in [-1, 1]."""
    return torch.stack(list(pictures)).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0


def pixels_of(store: Store, items: Sequence[Item]) -> Tensor:
    """Decoded, bucketed pictures (B, 3, H, W) float32 in [-1, 1]; all items share one bucket."""
    return normalised([picture_of(store, item) for item in items])
