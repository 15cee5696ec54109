"""Samples of a split as training sees them: rows of the latent cache, fetched by content, never by position."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from components.catalog.encodings import locate
from components.curation.manifest import SampleRow
from components.diffusion.draws import Draw
from components.errors import LatentCacheMismatch
from components.families.bases import BaseModel
from components.families.family import Framing
from components.latents.buckets import Placement, Sizing
from components.latents.keys import (
    NULL_PROMPT,
    caption_item,
    framing_of,
    mask_encoder_key,
    mask_item,
    pixel_encoder_key,
    placements,
    prompt_encoder_key,
    sample_item,
)
from components.latents.ragged import Tensors, stacked
from components.latents.reading import ShardReader, Watch
from components.latents.windows import known_windows
from components.latents.wording import Wording
from components.stages import Bench


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """Rows of the cache: what the family caches of pictures, conditioning tensors (B, ...), one id per row.

    `mask` (B, 1, h, w) in [0, 1] says how much each latent cell counts, `content` how much of it is picture and not
    padding; None where all of them do.
    """

    sample_ids: tuple[str, ...]
    cached: Tensors
    cond: Tensors
    mask: Tensor | None = None
    wordings: tuple[tuple[str, ...], ...] = ()  # of each sample: cache keys of its captions, `cond` has the first
    weights: Tensor | None = None  # (B,) factors on the losses; None: all 1
    texts: tuple[str, ...] = ()  # what `cond` is the embedding of
    content: Tensor | None = None

    def cells(self, latents: Tensor, unmasked_weight: float) -> Tensor | None:
        """Factors (B, 1, h, w) on the error of the latents' cells, a family's packed ones included; padding has 0."""
        if self.mask is None:
            return None
        size = (latents.shape[-2], latents.shape[-1])
        mask = torch.nn.functional.adaptive_avg_pool2d(self.mask, size)
        content = 1.0 if self.content is None else torch.nn.functional.adaptive_avg_pool2d(self.content, size)
        return (unmasked_weight * content + (1 - unmasked_weight) * mask).to(latents)


@dataclass(frozen=True, slots=True)
class Positions:
    """A batch as places in `CachedSamples`: only the process and the pass that need its tensors read them."""

    positions: tuple[int, ...]
    sample_ids: tuple[str, ...]

    def __getitem__(self, rows: slice) -> "Positions":
        return Positions(self.positions[rows], self.sample_ids[rows])


@dataclass(frozen=True, slots=True)
class CachedSamples:
    """A split's samples with the readers that fetch their latents and captions by content, never by position.

    A picture that is trained at several resolutions has a row for each of them.
    """

    rows: tuple[SampleRow, ...]
    latent_keys: tuple[str, ...]
    latents: ShardReader
    prompts: ShardReader
    framings: tuple[Framing, ...]
    sample_condition: Callable[[Framing], Tensors]
    masks: ShardReader | None = None
    mask_keys: tuple[str | None, ...] = ()  # None: the whole picture counts
    wordings: tuple[tuple[str, ...], ...] = ()  # of each row: keys of its captions, of which `reworded` draws one
    weights: tuple[float, ...] = ()  # of each row: factor on its loss; none: all 1
    texts: Mapping[str, str] = field(default_factory=dict)  # of captions, by their keys
    placements: tuple[Placement, ...] = ()  # of each row
    downscale: int = 1  # pixels per latent cell
    require_intact: Callable[[], None] = lambda: None  # raises DamagedArtifact where what was read is not what it was

    @property
    def ids(self) -> tuple[str, ...]:
        """What each row's place in an epoch hangs on; with weights every repeat has its own, so that the class's
        pictures, of which there are few, come between the data's instead of one after the other."""
        if not self.weights:
            return tuple(row.sha256 for row in self.rows)
        seen: Counter[str] = Counter()
        ids = []
        for row in self.rows:
            ids.append(f"{row.sha256}/{seen[row.sha256]}")
            seen[row.sha256] += 1
        return tuple(ids)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Each row's height and width in training: only rows of one bucket go through a model together."""
        return tuple(framing.target for framing in self.framings)

    def at(self, positions: Sequence[int]) -> Positions:
        return Positions(tuple(positions), tuple(self.rows[i].sha256 for i in positions))

    def batch(self, positions: Sequence[int]) -> LatentBatch:
        wordings, content = tuple(self.wordings[i] for i in positions), self._content(positions)
        return LatentBatch(
            tuple(self.rows[i].sha256 for i in positions),
            self.latents([self.latent_keys[i] for i in positions]),
            self.prompts([keys[0] for keys in wordings])
            | stacked([self.sample_condition(self.framings[i]) for i in positions]),
            self._mask(positions, content),
            wordings,
            torch.tensor([self.weights[i] for i in positions]) if self.weights else None,
            tuple(self.texts[keys[0]] for keys in wordings),
            content,
        )

    def reworded(self, batch: LatentBatch, draw: Draw) -> LatentBatch:
        """The batch with one of each sample's captions, drawn by (seed, step, sample)."""
        if all(len(keys) == 1 for keys in batch.wordings):
            return batch
        lots = draw.uniform(len(batch.wordings), "wording").tolist()
        keys = [keys[int(lot * len(keys))] for keys, lot in zip(batch.wordings, lots, strict=True)]
        return replace(batch, cond=batch.cond | self.prompts(keys), texts=tuple(self.texts[key] for key in keys))

    def _content(self, positions: Sequence[int]) -> Tensor | None:
        """(B, 1, h, w): shares of latent cells that are picture; None where there is no padding in the batch."""
        placed = [self.placements[i] for i in positions]
        if not any(placement.padded for placement in placed):
            return None
        return torch.stack([_content_cells(placement, self.downscale) for placement in placed])

    def _mask(self, positions: Sequence[int], content: Tensor | None) -> Tensor | None:
        if self.masks is None:
            return content
        rows = [self.masks([key])["mask"][0] if (key := self.mask_keys[i]) else None for i in positions]
        like = next((row for row in rows if row is not None), None)
        if like is None:
            return content
        whole = torch.ones_like(like)
        return torch.stack(
            [row if row is not None else whole if content is None else content[i] for i, row in enumerate(rows)]
        )


def _content_cells(placement: Placement, downscale: int) -> Tensor:
    """(1, h, w): how much of each latent cell of the bucket is picture."""
    left, top, right, bottom = placement.content
    picture = torch.zeros(placement.bucket.height, placement.bucket.width)
    picture[top:bottom, left:right] = 1
    return torch.nn.functional.avg_pool2d(picture[None], downscale)


def cached_samples(
    bench: Bench,
    rows: Sequence[SampleRow],
    base: BaseModel,
    sizing: Sizing,
    *,
    masked: bool,
    wording: Wording | None = None,
    weights: Sequence[float] = (),
) -> CachedSamples:
    """Readers over `rows`, with their masks if `masked`; without `wording` by their first caption as it is written.

    `weights` are factors on the losses of `rows`. The bytes of what is read are verified while it is read already: ask
    `require_intact` before publishing. Raises LatentCacheMismatch when an item is not cached.
    """
    windows, sizes = known_windows(bench, rows, sizing), len(sizing.resolutions)
    placed = [placement for row in rows for placement in placements(row, sizing, windows)]
    rows = [row for row in rows for _ in range(sizes)]
    keys = tuple(sample_item(row, placement).key for row, placement in zip(rows, placed, strict=True))
    texts = [wording.texts(row) if wording else (row.text,) for row in rows]
    wordings = tuple(tuple(caption_item(text).key for text in of_row) for of_row in texts)
    captions = [*{key for of_row in wordings for key in of_row}, caption_item(NULL_PROMPT).key]
    latents = locate(bench.catalog, pixel_encoder_key(base), keys)
    prompts = locate(bench.catalog, prompt_encoder_key(base), captions)
    mask_items = [mask_item(row, placement) if masked else None for row, placement in zip(rows, placed, strict=True)]
    mask_keys = tuple(item.key if item else None for item in mask_items)
    masks = locate(bench.catalog, mask_encoder_key(base), [key for key in mask_keys if key])
    lacking = (set(keys) - set(latents), set(captions) - set(prompts), set(mask_keys) - set(masks) - {None})
    missing = sum(map(len, lacking))
    if missing:
        raise LatentCacheMismatch(f"{missing} items are not in the latent cache; run the caching stage again")
    watch = Watch(bench)
    return CachedSamples(
        tuple(rows),
        keys,
        ShardReader(bench.store, latents, watch),
        ShardReader(bench.store, prompts, watch),
        tuple(framing_of(row, placement) for row, placement in zip(rows, placed, strict=True)),
        base.architecture.sample_condition,
        ShardReader(bench.store, masks, watch) if masks else None,
        mask_keys,
        wordings,
        tuple(weight for weight in weights for _ in range(sizes)),
        {caption_item(text).key: text for of_row in texts for text in of_row},
        tuple(placed),
        base.architecture.geometry(base.path).downscale,
        watch.require_intact,
    )
