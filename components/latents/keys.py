"""What a cached item is called: what it was made from, under an encoder key that holds everything else it depends on.

An item's key is the digest of decoded pixels with their bucket, or of a caption's text. An encoder's key is the digest
of its weights, the precision stored and the version of the encoding code. The flow uses this module: it knows no torch.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from components.config import TrainingConfig
from components.curation.manifest import SampleRow
from components.families.bases import BaseModel
from components.families.family import Framing
from components.latents.buckets import Bucket, assign, buckets, placement
from components.latents.wording import Wording
from components.stages import canonical_json, stage_key

ENCODING_VERSION = 1  # raise when encoding.py changes what it stores
NULL_PROMPT = ""  # what classifier-free guidance and caption dropout are conditioned on


@dataclass(frozen=True, slots=True)
class Item:
    """Something to encode: `key` says what it is made from."""

    key: str
    bytes_sha256: str = ""  # of the picture in the store
    bucket: Bucket | None = None
    caption: str = ""
    file_name: str = ""  # of the picture, for messages


def image_item(sha256: str, rgb_digest: str, bucket: Bucket, file_name: str) -> Item:
    return Item(f"{rgb_digest}@{bucket.width}x{bucket.height}", sha256, bucket, file_name=file_name)


def mask_item(row: SampleRow, sizes: tuple[Bucket, ...]) -> Item | None:
    """A sample's mask in the sample's bucket; None when it has none."""
    if row.mask is None:
        return None
    return image_item(row.mask, row.mask, assign(row.width, row.height, sizes), row.file_name)


def caption_item(caption: str) -> Item:
    return Item(hashlib.sha256(caption.encode()).hexdigest(), caption=caption)


def pixel_encoder_key(base: BaseModel) -> str:
    """Everything that latents depend on besides the picture and its bucket."""
    return _key(
        {
            "kind": "latents",
            "weights": base.digest_of(base.architecture.pixel_parts),
            "dtype": "float16",
            "version": ENCODING_VERSION,
        }
        | ({"computed": base.vae_precision} if base.vae_precision != "fp32" else {})
    )


def mask_encoder_key(base: BaseModel) -> str:
    """Everything that a mask in latent cells depends on besides its pixels and its bucket."""
    downscale = base.architecture.geometry(base.path).downscale
    return _key({"kind": "masks", "downscale": downscale, "version": ENCODING_VERSION})


def prompt_encoder_key(base: BaseModel) -> str:
    """Everything that prompt embeddings depend on besides the caption."""
    family = base.architecture
    settings = family.prompt_settings(base.path)
    return _key(
        {
            "kind": "prompts",
            "weights": base.digest_of(family.prompt_parts),
            "dtype": family.precision,
            "version": ENCODING_VERSION,
        }
        | ({"settings": settings} if settings else {})
    )


def _key(body: Mapping[str, object]) -> str:
    return hashlib.sha256(canonical_json(body)).hexdigest()[:32]


def training_size(base: BaseModel, training: TrainingConfig) -> int:
    """The side in pixels that this recipe trains at."""
    if training.resolution == "auto":
        return base.architecture.geometry(base.path).resolution
    return training.resolution


def training_buckets(base: BaseModel, resolution: int) -> tuple[Bucket, ...]:
    return buckets(resolution, base.architecture.geometry(base.path))


def cache_key(snapshot_digest: str, base: BaseModel, resolution: int, wording: Wording) -> str:
    return stage_key(
        "cache",
        inputs={
            "snapshot": snapshot_digest,
            "pixel_encoder": pixel_encoder_key(base),
            "prompt_encoder": prompt_encoder_key(base),
        },
        config={"resolution": resolution} | wording.settings(),
    )


def sample_item(row: SampleRow, sizes: tuple[Bucket, ...]) -> Item:
    return image_item(row.sha256, row.rgb_digest, assign(row.width, row.height, sizes), row.file_name)


def framing_of(row: SampleRow, sizes: tuple[Bucket, ...]) -> Framing:
    """How `sample_item`'s picture came to its bucket."""
    bucket = assign(row.width, row.height, sizes)
    _, (left, top) = placement(row.width, row.height, bucket)
    return Framing((row.height, row.width), (top, left), (bucket.height, bucket.width))
