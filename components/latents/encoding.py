"""The latent cache: what the base's encoders make of pictures and captions, kept by content and read by sample id.

Nothing stale can be read, a change of 1 % of a dataset costs 1 % of the encoding, and going back to an earlier state
costs nothing: `keys.py` says why.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from safetensors.torch import load
from sqlalchemy import select
from torch import Tensor

from components.catalog.database import Catalog
from components.catalog.models import EncodedItem
from components.curation.pixels import decode
from components.errors import LatentCacheMismatch, TrainingDiverged
from components.latents.buckets import fit
from components.latents.keys import Item
from components.latents.ragged import Tensors, row_shape, shortened, stacked
from components.stages import Bench
from components.storage import ObjectRef, Store, sha256_of
from components.tensors import to_safetensors

MICRO_BATCH = 8  # always full, padded with the last item: bits then depend neither on order nor on neighbours
SHARD_ITEMS = 1024
QUERY_ITEMS = 500  # keys in one SQL statement


def encode_missing(
    bench: Bench,
    encoder: str,
    items: Sequence[Item],
    encode: Callable[[list[Item]], Tensors],
    on_progress: Callable[[int], None],
) -> int:
    """Encode the items that no shard holds yet, a shard at a time; returns how many were encoded.

    A shard is an object plus one row per item, written in one transaction: a kill costs at most the shard at work.
    Raises TrainingDiverged, naming the picture's file or the caption, when what would be kept is not finite.
    """
    unique = list({item.key: item for item in items}.values())
    places = locate(bench.catalog, encoder, [item.key for item in unique])
    intact = {shard for shard in {shard for shard, _ in places.values()} if _is_intact(bench.store, shard)}
    held = {key for key, (shard, _) in places.items() if shard in intact}
    missing = [item for item in unique if item.key not in held]
    on_progress(len(unique) - len(missing))
    for start in range(0, len(missing), SHARD_ITEMS):
        part = missing[start : start + SHARD_ITEMS]
        pieces: list[Tensors] = []
        for first in range(0, len(part), MICRO_BATCH):
            batch = part[first : first + MICRO_BATCH]
            padded = batch + [batch[-1]] * (MICRO_BATCH - len(batch))
            tensors = shortened({name: tensor[: len(batch)] for name, tensor in encode(padded).items()})
            _require_finite(batch, tensors)
            pieces.append(tensors)
            on_progress(len(batch))
        for shape in _shapes(pieces):  # one shard per bucket shape
            rows = [
                (item.key, {name: tensor[i] for name, tensor in piece.items()})
                for piece, first in zip(pieces, range(0, len(part), MICRO_BATCH), strict=True)
                for i, item in enumerate(part[first : first + MICRO_BATCH])
                if row_shape(piece) == shape
            ]
            _commit_shard(bench, encoder, [key for key, _ in rows], stacked([row for _, row in rows]))
    return len(missing)


def _is_intact(store: Store, shard: str) -> bool:
    path = store.path(shard)
    return path.exists() and sha256_of(path) == shard


def _shapes(pieces: Iterable[Tensors]) -> list[tuple[tuple[int, ...], ...]]:
    return list(dict.fromkeys(row_shape(piece) for piece in pieces))


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


def _commit_shard(bench: Bench, encoder: str, keys: list[str], tensors: Tensors) -> None:
    ref = bench.store.put(to_safetensors(tensors, {"encoder": encoder}))
    with bench.catalog.write() as session:
        for row, key in enumerate(keys):
            session.merge(EncodedItem(encoder=encoder, item=key, shard=ref.sha256, row=row))


def locate(catalog: Catalog, encoder: str, keys: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Where each of `keys` lies, as far as it is encoded: key -> (shard, row)."""
    found: dict[str, tuple[str, int]] = {}
    with catalog.read() as session:
        for start in range(0, len(keys), QUERY_ITEMS):
            rows = session.execute(
                select(EncodedItem.item, EncodedItem.shard, EncodedItem.row).where(
                    EncodedItem.encoder == encoder, EncodedItem.item.in_(keys[start : start + QUERY_ITEMS])
                )
            )
            found.update({item: (shard, row) for item, shard, row in rows})
    return found


def shard_refs(store: Store, places: Iterable[tuple[str, int]]) -> dict[str, ObjectRef]:
    """The objects behind some places, for a stage's manifest."""
    return {
        shard: ObjectRef(shard, store.path(shard).stat().st_size) for shard in sorted({shard for shard, _ in places})
    }


class ShardReader:
    """Reads cached rows by key. Shards are verified against their names once, when first opened."""

    def __init__(self, store: Store, places: dict[str, tuple[str, int]]):
        self._store, self._places = store, places
        self._open: dict[str, Tensors] = {}

    def __call__(self, keys: Sequence[str]) -> Tensors:
        """The rows of `keys`, in that order, each tensor (B, ...). Raises LatentCacheMismatch when a key is unknown."""
        return stacked([self._row(key) for key in keys])

    def _row(self, key: str) -> Tensors:
        if key not in self._places:
            raise LatentCacheMismatch(f"no cached item {key}; run the caching stage again")
        shard, row = self._places[key]
        if shard not in self._open:
            self._open[shard] = load(self._store.read(shard))
        return {name: tensor[row] for name, tensor in self._open[shard].items()}


def pixels_of(store: Store, items: Sequence[Item]) -> Tensor:
    """Decoded, bucketed pictures (B, 3, H, W) float32 in [-1, 1]; all items share one bucket."""
    arrays = []
    for item in items:
        assert item.bucket is not None
        arrays.append(np.asarray(fit(decode(store.read(item.bytes_sha256)), item.bucket), dtype=np.float32))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1.0
