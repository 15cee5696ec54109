"""The cache stage: latents for every kept picture, embeddings for every caption it will be asked for."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.catalog.encodings import locate
from components.curation.manifest import SampleRow
from components.families.autoencoders import half_where_it_agrees
from components.families.bases import BaseModel
from components.families.family import PixelEncoder
from components.families.placement import release_memory
from components.latents.buckets import Bucket, Sizing
from components.latents.encoding import encode_missing, normalised, picture_of
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

    encoded_captions = _encode_captions(bench, base, captions, advance)
    encoded_images = _encode_pictures(bench, base, images, advance)
    _encode_masks(bench, base, masks)
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


def _encode_captions(bench: Bench, base: BaseModel, items: list[Item], advance: Callable[[int], None]) -> int:
    encoder, family, device = None, base.architecture, default_device()
    stored = getattr(torch, family.precision)

    def encode(batch: list[Item]) -> Tensors:
        nonlocal encoder
        encoder = encoder or family.load_prompt_encoder(base.path, device)
        tensors = encoder.encode([item.caption for item in batch])
        return {name: tensor.to(stored) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    try:
        return encode_missing(bench, prompt_encoder_key(base), items, encode, advance)
    finally:
        encoder = None
        release_memory()


def _encode_pictures(bench: Bench, base: BaseModel, items: list[Item], advance: Callable[[int], None]) -> int:
    encoder = None

    def encode(pictures: list[Tensor]) -> Tensors:
        nonlocal encoder
        encoder = encoder or _pixel_encoder(base)
        return {name: tensor.to(torch.float16) for name, tensor in encoder.encode(normalised(pictures)).items()}

    try:
        return _encode_by_bucket(bench, pixel_encoder_key(base), items, encode, advance)
    finally:
        encoder = None
        release_memory()


def _pixel_encoder(base: BaseModel) -> PixelEncoder:
    family, device = base.architecture, default_device()
    encoder = family.load_pixel_encoder(base.path, device)
    if base.vae_precision == "fp32":
        return encoder
    return half_where_it_agrees(encoder, family.geometry(base.path).resolution, device)


def _encode_masks(bench: Bench, base: BaseModel, items: list[Item]) -> None:
    """Masks as weights in [0, 1] of latent cells: the mean of the pixels that a cell stands for, (B, 1, h, w)."""
    downscale = base.architecture.geometry(base.path).downscale

    def encode(pictures: list[Tensor]) -> Tensors:
        grey = (normalised(pictures)[:, :1] + 1) / 2
        return {"mask": torch.nn.functional.avg_pool2d(grey, downscale).clamp(0, 1)}

    _encode_by_bucket(bench, mask_encoder_key(base), items, encode, lambda count: None)


def _encode_by_bucket(
    bench: Bench,
    encoder: str,
    items: list[Item],
    encode: Callable[[list[Tensor]], Tensors],
    advance: Callable[[int], None],
) -> int:
    by_bucket: dict[Bucket, list[Item]] = defaultdict(list)
    for item in items:
        assert item.bucket is not None
        by_bucket[item.bucket].append(item)
    return sum(
        encode_missing(
            bench, encoder, by_bucket[bucket], encode, advance, prepare=lambda item: picture_of(bench.store, item)
        )
        for bucket in sorted(by_bucket)
    )
