"""What a cached item is called: what it was made from, under an encoder key that holds everything else it depends on.

An item's key is the digest of decoded pixels with their bucket and window, or of a caption's text. An encoder's key is
the digest of its weights, the precision stored and the version of the encoding code. The flow uses this module: it
knows no torch.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from components.config import TrainingConfig
from components.curation.manifest import SampleRow
from components.curation.masks import BLACK
from components.curation.pixels import WHITE
from components.errors import LatentCacheMismatch
from components.families.bases import BaseModel
from components.families.family import Framing, Geometry
from components.latents.buckets import Bucket, Placement, Sizing, cover
from components.latents.saliency import SALIENCY_VERSION
from components.latents.wording import Wording
from components.stages import canonical_json, stage_key

ENCODING_VERSION = 1  # raise when encoding.py changes what it stores
LATENTS_VERSION = 3  # raise when autoencoders.py changes latents
NULL_PROMPT = ""  # what classifier-free guidance and caption dropout are conditioned on
Windows = Mapping[str, tuple[int, int]]  # corners of windows that saliency has chosen, by `window_item`'s keys


@dataclass(frozen=True, slots=True)
class Item:
    """Something to encode: `key` says what it is made from."""

    key: str
    bytes_sha256: str = ""  # of the picture in the store
    placement: Placement | None = None
    caption: str = ""
    file_name: str = ""  # of the picture, for messages
    background: tuple[int, int, int] = WHITE  # of padding

    @property
    def bucket(self) -> Bucket | None:
        return self.placement.bucket if self.placement else None


def sample_item(row: SampleRow, placement: Placement) -> Item:
    """A sample's picture as it is trained."""
    return Item(_placed_key(row.rgb_digest, row, placement), row.sha256, placement, file_name=row.file_name)


def mask_item(row: SampleRow, placement: Placement) -> Item | None:
    """A sample's mask, which comes to the bucket as the sample's picture does; None when it has none."""
    if row.mask is None:
        return None
    key = _placed_key(row.mask, row, placement)
    return Item(key, row.mask, placement, file_name=row.file_name, background=BLACK)


def window_item(row: SampleRow, placement: Placement) -> Item:
    """The window of a sample's picture that saliency chooses."""
    bucket = placement.bucket
    key = f"window:{row.rgb_digest}@{bucket.width}x{bucket.height}"
    return Item(key, row.sha256, placement, file_name=row.file_name)


def _placed_key(digest: str, row: SampleRow, placement: Placement) -> str:
    """With the size and place in the bucket of a picture that does not just fill it by its centre."""
    bucket = placement.bucket
    key = f"{digest}@{bucket.width}x{bucket.height}"
    if placement == cover(row.width, row.height, bucket):
        return key
    return f"{key}:{placement.width}x{placement.height}{placement.left:+d}{placement.top:+d}"


def caption_item(caption: str) -> Item:
    return Item(hashlib.sha256(caption.encode()).hexdigest(), caption=caption)


def pixel_encoder_key(base: BaseModel) -> str:
    """Everything that latents depend on besides the picture and its bucket."""
    return _key(
        {
            "kind": "latents",
            "weights": base.digest_of(base.architecture.pixel_parts),
            "dtype": "float16",
            "version": LATENTS_VERSION,
        }
        | ({"computed": base.vae_precision} if base.vae_precision != "fp32" else {})
    )


def mask_encoder_key(base: BaseModel) -> str:
    """Everything that a mask in latent cells depends on besides its pixels and its bucket."""
    downscale = base.architecture.geometry(base.path).downscale
    return _key({"kind": "masks", "downscale": downscale, "version": ENCODING_VERSION})


def window_encoder_key() -> str:
    """Everything that windows depend on besides the picture and its bucket."""
    return _key({"kind": "windows", "version": SALIENCY_VERSION})


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
    """The side in pixels that this recipe draws and validates at: the largest that it trains at."""
    return training_sizing(base, training).resolution


def training_sizing(base: BaseModel, training: TrainingConfig) -> Sizing:
    """The sizes that this recipe trains at."""
    return sizing_of(base.architecture.geometry(base.path), training)


def sizing_of(geometry: Geometry, training: TrainingConfig) -> Sizing:
    """The sizes that a recipe trains at on a base of this geometry."""
    asked = geometry.resolution if training.resolution == "auto" else training.resolution
    resolutions = asked if isinstance(asked, tuple) else (asked,)
    return Sizing(resolutions, geometry, training.crop, training.bucket_no_upscale)


def usual_sizing(base: BaseModel, resolution: int) -> Sizing:
    """One resolution and nothing else asked."""
    return sizing_of(base.architecture.geometry(base.path), TrainingConfig(resolution=resolution))


def placements(row: SampleRow, sizing: Sizing, windows: Windows | None = None) -> tuple[Placement, ...]:
    """How a sample's picture comes to its buckets, one for each resolution; `windows` where saliency chooses them.

    Raises LatentCacheMismatch when a window that is needed is not known.
    """
    placed = sizing.place(row.width, row.height)
    if sizing.crop != "smart":
        return placed
    return tuple(_moved(row, placement, windows or {}) for placement in placed)


def _moved(row: SampleRow, placement: Placement, windows: Windows) -> Placement:
    if placement.slack == (0, 0):
        return placement
    corner = windows.get(window_item(row, placement).key)
    if corner is None:
        raise LatentCacheMismatch(f"{row.file_name}: its crop is not known; run the caching stage again")
    return placement.at(corner)


def cache_key(snapshot_digest: str, base: BaseModel, sizing: Sizing, wording: Wording) -> str:
    return stage_key(
        "cache",
        inputs={
            "snapshot": snapshot_digest,
            "pixel_encoder": pixel_encoder_key(base),
            "prompt_encoder": prompt_encoder_key(base),
        },
        config=sizing.settings() | wording.settings(),
    )


def framing_of(row: SampleRow, placement: Placement) -> Framing:
    """How `sample_item`'s picture came to its bucket."""
    bucket = placement.bucket
    corner = max(0, placement.top), max(0, placement.left)
    return Framing((row.height, row.width), corner, (bucket.height, bucket.width))
