"""The cache stage: latents for every kept picture, embeddings for every caption it will be asked for."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.catalog.encodings import locate
from components.curation.manifest import SampleRow
from components.families.autoencoders import half_where_it_agrees
from components.families.bases import BaseModel
from components.families.family import PixelEncoder
from components.latents.buckets import Bucket, Sizing
from components.latents.crews import Task, encode_by_crew
from components.latents.encoding import Encode, normalised, picture_of
from components.latents.keys import (
    NULL_PROMPT,
    Item,
    caption_item,
    mask_encoder_key,
    mask_item,
    pixel_encoder_key,
    placements,
    prompt_encoder_key,
    sample_item,
    window_encoder_key,
)
from components.latents.ragged import Tensors
from components.latents.reading import shard_refs
from components.latents.windows import find_windows, window_items
from components.latents.wording import Wording
from components.stages import Bench, Product, canonical_json
from components.tensors import default_device

AS_WRITTEN = Wording()


def cache_latents(
    bench: Bench,
    rows: Sequence[SampleRow],
    base: BaseModel,
    sizing: Sizing,
    on_progress: Callable[[int, int], None],
    *,
    wording: Wording = AS_WRITTEN,
) -> Product:
    """Encode what is not yet encoded of a snapshot, training captions in every wording that training may ask for, and
    training pictures at every resolution; others are looked at in the largest alone.

    The product's outputs are the shards; facts count the encodes.
    """
    windows = find_windows(bench, rows, sizing, on_progress)
    placed = [
        (row, placement)
        for row in rows
        for placement in placements(row, sizing if row.split == "train" else sizing.largest, windows)
    ]
    images = [sample_item(row, placement) for row, placement in placed]
    masks = [item for row, placement in placed if (item := mask_item(row, placement))]
    captions = [caption_item(text) for text in sorted(_texts(rows, wording))]
    total, done = len({item.key for item in images}) + len(captions), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    encoded_captions, encoded_images, _ = encode_by_crew(
        bench,
        [
            Task(Prompts(base), [captions], advance),
            Task(Latents(base), _by_bucket(images), advance),
            Task(Masks(base), _by_bucket(masks)),
        ],
    )
    places = locate(bench.catalog, pixel_encoder_key(base), [item.key for item in images]) | locate(
        bench.catalog, prompt_encoder_key(base), [item.key for item in captions]
    )
    places |= locate(bench.catalog, mask_encoder_key(base), [item.key for item in masks])
    places |= locate(bench.catalog, window_encoder_key(), [item.key for item in window_items(rows, sizing)])
    index = bench.store.put(canonical_json({key: list(place) for key, place in sorted(places.items())}))
    per_bucket: dict[str, int] = defaultdict(int)
    for item in images:
        assert item.bucket is not None
        per_bucket[f"{item.bucket.width}x{item.bucket.height}"] += 1
    return Product(
        {"index": index} | shard_refs(bench.store, places.values()),
        {
            "buckets": dict(sorted(per_bucket.items())),
            "encoded_images": encoded_images,
            "encoded_captions": encoded_captions,
        },
        items=encoded_images + encoded_captions,
    )


def _texts(rows: Sequence[SampleRow], wording: Wording) -> set[str]:
    varied = {text for row in rows if row.split == "train" for text in wording.texts(row)}
    return {row.text for row in rows} | varied | {NULL_PROMPT}


@dataclass(frozen=True, slots=True)
class Prompts:
    """Embeddings of captions by a base's text encoders."""

    base: BaseModel

    @property
    def key(self) -> str:
        return prompt_encoder_key(self.base)

    def prepare(self, bench: Bench, item: Item) -> str:
        return item.caption

    def load(self) -> Encode:
        family = self.base.architecture
        encoder, stored = family.load_prompt_encoder(self.base.path, default_device()), getattr(torch, family.precision)

        def encode(captions: list[str]) -> Tensors:
            tensors = encoder.encode(captions).items()
            return {name: tensor.to(stored) if tensor.is_floating_point() else tensor for name, tensor in tensors}

        return encode


@dataclass(frozen=True, slots=True)
class Latents:
    """Mean and log-variance of pictures' latents by a base's autoencoder, in float16."""

    base: BaseModel

    @property
    def key(self) -> str:
        return pixel_encoder_key(self.base)

    def prepare(self, bench: Bench, item: Item) -> Tensor:
        return picture_of(bench.store, item)

    def load(self) -> Encode:
        encoder = self._encoder()

        def encode(pictures: list[Tensor]) -> Tensors:
            return {name: tensor.to(torch.float16) for name, tensor in encoder.encode(normalised(pictures)).items()}

        return encode

    def _encoder(self) -> PixelEncoder:
        family, device = self.base.architecture, default_device()
        encoder = family.load_pixel_encoder(self.base.path, device)
        if self.base.vae_precision == "fp32":
            return encoder
        return half_where_it_agrees(encoder, family.geometry(self.base.path).resolution, device)


@dataclass(frozen=True, slots=True)
class Masks:
    """Masks as weights in [0, 1] of latent cells: the mean of the pixels that a cell stands for, (B, 1, h, w)."""

    base: BaseModel

    @property
    def key(self) -> str:
        return mask_encoder_key(self.base)

    def prepare(self, bench: Bench, item: Item) -> Tensor:
        return picture_of(bench.store, item)

    def load(self) -> Encode:
        downscale = self.base.architecture.geometry(self.base.path).downscale

        def encode(pictures: list[Tensor]) -> Tensors:
            grey = (normalised(pictures)[:, :1] + 1) / 2
            return {"mask": torch.nn.functional.avg_pool2d(grey, downscale).clamp(0, 1)}

        return encode


def _by_bucket(items: Sequence[Item]) -> list[list[Item]]:
    by_bucket: dict[Bucket, list[Item]] = defaultdict(list)
    for item in items:
        assert item.bucket is not None
        by_bucket[item.bucket].append(item)
    return [by_bucket[bucket] for bucket in sorted(by_bucket)]
