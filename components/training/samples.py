"""Samples of a split as training sees them: rows of the latent cache, fetched by content, never by position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.curation.snapshots import SampleRow
from components.errors import LatentCacheMismatch
from components.families.bases import BaseModel
from components.families.family import Framing
from components.latents.encoding import ShardReader, Tensors, locate
from components.latents.keys import (
    NULL_PROMPT,
    caption_item,
    framing_of,
    mask_encoder_key,
    mask_item,
    pixel_encoder_key,
    prompt_encoder_key,
    sample_item,
    training_buckets,
)
from components.latents.ragged import stacked
from components.stages import Bench


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """Rows of the cache: what the family caches of pictures, conditioning tensors (B, ...), one id per row.

    `mask` (B, 1, h, w) in [0, 1] says how much each latent cell counts; None where masks are not asked for.
    """

    sample_ids: tuple[str, ...]
    cached: Tensors
    cond: Tensors
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Positions:
    """A batch as places in `CachedSamples`: only the process and the pass that need its tensors read them."""

    positions: tuple[int, ...]
    sample_ids: tuple[str, ...]

    def __getitem__(self, rows: slice) -> "Positions":
        return Positions(self.positions[rows], self.sample_ids[rows])


@dataclass(frozen=True, slots=True)
class CachedSamples:
    """A split's samples with the readers that fetch their latents and captions by content, never by position."""

    rows: tuple[SampleRow, ...]
    latent_keys: tuple[str, ...]
    latents: ShardReader
    prompts: ShardReader
    framings: tuple[Framing, ...]
    sample_condition: Callable[[Framing], Tensors]
    masks: ShardReader | None = None
    mask_keys: tuple[str | None, ...] = ()  # None: the whole picture counts

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(row.sha256 for row in self.rows)

    def at(self, positions: Sequence[int]) -> Positions:
        return Positions(tuple(positions), tuple(self.rows[i].sha256 for i in positions))

    def batch(self, positions: Sequence[int]) -> LatentBatch:
        rows = [self.rows[i] for i in positions]
        return LatentBatch(
            tuple(row.sha256 for row in rows),
            self.latents([self.latent_keys[i] for i in positions]),
            self.prompts([caption_item(row.text).key for row in rows])
            | stacked([self.sample_condition(self.framings[i]) for i in positions]),
            self._mask(positions),
        )

    def _mask(self, positions: Sequence[int]) -> Tensor | None:
        if self.masks is None:
            return None
        rows = [self.masks([key])["mask"][0] if (key := self.mask_keys[i]) else None for i in positions]
        like = next((row for row in rows if row is not None), None)
        if like is None:
            return None
        return torch.stack([torch.ones_like(like) if row is None else row for row in rows])


def cached_samples(
    bench: Bench, rows: Sequence[SampleRow], base: BaseModel, resolution: int, *, masked: bool
) -> CachedSamples:
    """Readers over `rows`, with their masks if `masked`. Raises LatentCacheMismatch when an item is not cached."""
    sizes = training_buckets(base, resolution)
    keys = tuple(sample_item(row, sizes).key for row in rows)
    captions = [caption_item(text).key for text in {row.text for row in rows} | {NULL_PROMPT}]
    latents = locate(bench.catalog, pixel_encoder_key(base), keys)
    prompts = locate(bench.catalog, prompt_encoder_key(base), captions)
    mask_items = [mask_item(row, sizes) if masked else None for row in rows]
    mask_keys = tuple(item.key if item else None for item in mask_items)
    masks = locate(bench.catalog, mask_encoder_key(base), [key for key in mask_keys if key])
    lacking = (set(keys) - set(latents), set(captions) - set(prompts), set(mask_keys) - set(masks) - {None})
    missing = sum(map(len, lacking))
    if missing:
        raise LatentCacheMismatch(f"{missing} items are not in the latent cache; run the caching stage again")
    return CachedSamples(
        tuple(rows),
        keys,
        ShardReader(bench.store, latents),
        ShardReader(bench.store, prompts),
        tuple(framing_of(row, sizes) for row in rows),
        base.architecture.sample_condition,
        ShardReader(bench.store, masks) if masks else None,
        mask_keys,
    )
