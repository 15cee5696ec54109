"""Aspect buckets: the picture sizes that are trained, which of them a picture goes to, and how it gets there.

A resolution is an area: its buckets are all sizes up to that area on the family's grid. Several resolutions train every
picture at each of them, as ai-toolkit does. Unless asked, no picture is enlarged: one that is too small for a
resolution's bucket takes that of the next smaller resolution on the grid.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from PIL import Image

from components.config import CropPolicy
from components.curation.pixels import WHITE
from components.errors import BadInput
from components.families.family import Geometry
from components.latents.saliency import SALIENCY_VERSION

MAX_ASPECT = 2.0  # area of a bucket's longest side squared over the resolution's


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Placement:
    """How a picture comes to its bucket: it is resized and seen through a window of the bucket's size."""

    bucket: Bucket
    width: int  # of the picture as it is resized
    height: int
    left: int  # the window's corner in the resized picture; below 0 there is padding before the picture
    top: int

    @property
    def slack(self) -> tuple[int, int]:
        """How far the window can be moved across and down; below 0: how much padding there is."""
        return self.width - self.bucket.width, self.height - self.bucket.height

    @property
    def content(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of what the bucket shows of the picture; the rest of it is padding."""
        return (
            max(0, -self.left),
            max(0, -self.top),
            min(self.bucket.width, self.width - self.left),
            min(self.bucket.height, self.height - self.top),
        )

    @property
    def padded(self) -> bool:
        return min(self.slack) < 0

    @property
    def centred(self) -> "Placement":
        across, down = self.slack
        return replace(self, left=across // 2, top=down // 2)

    def at(self, corner: tuple[int, int]) -> "Placement":
        """With the window's corner there."""
        return replace(self, left=corner[0], top=corner[1])


@dataclass(frozen=True, slots=True)
class Sizing:
    """At which sizes a recipe trains, and how pictures come to them."""

    resolutions: tuple[int, ...]  # sides in pixels, the largest first
    geometry: Geometry
    crop: CropPolicy
    no_upscale: bool

    @property
    def resolution(self) -> int:
        """The side in pixels that is drawn and validated at."""
        return self.resolutions[0]

    @property
    def largest(self) -> "Sizing":
        """With the largest resolution alone."""
        return replace(self, resolutions=self.resolutions[:1])

    def place(self, width: int, height: int) -> tuple[Placement, ...]:
        """Where an upright picture of this size is trained: once for each resolution, its window in the centre."""
        return tuple(self._placed(width, height, resolution) for resolution in self.resolutions)

    def buckets_of(self, resolution: int) -> tuple[Bucket, ...]:
        """Every bucket that a picture may go to at one of the resolutions, each once."""
        return tuple(dict.fromkeys(bucket for rung in self._rungs(resolution) for bucket in rung.sizes))

    def settings(self) -> dict[str, Any]:
        """What a cache depends on; what makes no difference for this base is left out, so that older keys stay."""
        several = len(self.resolutions) > 1
        ladders = any(len(ladder(resolution, self.geometry)) > 1 for resolution in self.resolutions)
        return (
            {"resolution": list(self.resolutions) if several else self.resolution}
            | ({"crop": self.crop} if self.crop != "centre" else {})
            | ({"saliency": SALIENCY_VERSION} if self.crop == "smart" else {})
            | ({"bucket_no_upscale": True} if self.no_upscale and (ladders or self.crop == "pad") else {})
        )

    def _rungs(self, resolution: int) -> "tuple[Rung, ...]":
        rungs = ladder(resolution, self.geometry)
        return rungs if self.no_upscale else rungs[:1]

    def _placed(self, width: int, height: int, resolution: int) -> Placement:
        padded, bucket = self.crop == "pad", Bucket(0, 0)
        for rung in self._rungs(resolution):
            bucket = rung.nearest(width, height)
            filled = bucket.width <= width, bucket.height <= height
            if any(filled) if padded else all(filled):
                break
        else:
            if padded and self.no_upscale:
                return _padded(width, height, bucket)
        return (contain if padded else cover)(width, height, bucket)


@lru_cache(maxsize=1024)
def buckets(resolution: int, geometry: Geometry, *, max_aspect: float = MAX_ASPECT) -> tuple[Bucket, ...]:
    """Every size whose area is at most resolution**2, sides multiples of the family's step, widest last.

    For each width the tallest fitting height is taken; sides shorter than the family's minimum are left out, so that a
    resolution with no room for them has the square alone. Raises BadInput when not even the square is on the grid.
    """
    step = geometry.side_step
    if resolution < step:
        raise BadInput(f"training.resolution is {resolution}, but this base takes sides in steps of {step}; raise it")
    longest = int(resolution * math.sqrt(max_aspect)) // step * step
    sizes = {Bucket(resolution // step * step, resolution // step * step)}
    if geometry.min_side >= resolution:
        return tuple(sizes)
    for width in range(geometry.min_side, max(longest, resolution) + 1, step):
        height = min(resolution * resolution // width // step * step, max(longest, resolution))
        if height >= geometry.min_side:
            sizes.add(Bucket(width, height))
    return tuple(sorted(sizes))


@lru_cache(maxsize=1024)
def ladder(resolution: int, geometry: Geometry) -> "tuple[Rung, ...]":
    """The buckets of `resolution` and of each smaller one, a step of the grid apart, down to the family's least."""
    least = min(geometry.min_side, resolution)
    return tuple(Rung.of(buckets(side, geometry)) for side in range(resolution, least - 1, -geometry.side_step))


@dataclass(frozen=True, slots=True, eq=False)
class Rung:
    """The buckets of one resolution by their aspect ratio, of equal ones the largest alone."""

    sizes: tuple[Bucket, ...]
    aspects: tuple[float, ...]  # logarithms of width over height, rising

    @classmethod
    def of(cls, sizes: Sequence[Bucket]) -> "Rung":
        of_aspect = {
            math.log(size.width / size.height): size
            for size in sorted(sizes, key=lambda size: size.width * size.height)
        }
        aspects = sorted(of_aspect)
        return cls(tuple(of_aspect[aspect] for aspect in aspects), tuple(aspects))

    def nearest(self, width: int, height: int) -> Bucket:
        """The bucket whose aspect ratio is nearest in log space; of equals the larger."""
        aspect, sizes, aspects = math.log(width / height), self.sizes, self.aspects
        place = bisect_left(aspects, aspect)
        near = range(max(0, place - 1), min(len(aspects), place + 1))
        return sizes[min(near, key=lambda i: (abs(aspects[i] - aspect), -sizes[i].width * sizes[i].height))]


def cover(width: int, height: int, bucket: Bucket) -> Placement:
    """Resized until the bucket is full; what stands out is cut off on both sides alike."""
    scale = max(bucket.width / width, bucket.height / height)
    size = max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))
    return Placement(bucket, *size, 0, 0).centred


def contain(width: int, height: int, bucket: Bucket) -> Placement:
    """Resized until all of the picture is in the bucket; what it leaves free is padded on both sides alike."""
    scale = min(bucket.width / width, bucket.height / height)
    return _padded(
        min(bucket.width, max(1, round(width * scale))), min(bucket.height, max(1, round(height * scale))), bucket
    )


def _padded(width: int, height: int, bucket: Bucket) -> Placement:
    return Placement(bucket, width, height, 0, 0).centred


def fit(image: Image.Image, placement: Placement, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """An RGB image as training sees it (Lanczos), padding in `background`; of the bucket's size it is left as it is."""
    bucket, size = placement.bucket, (placement.width, placement.height)
    if image.size == (bucket.width, bucket.height) == size:
        return image
    resized = image.resize(size, Image.Resampling.LANCZOS)
    if placement.padded:
        sheet = Image.new("RGB", (bucket.width, bucket.height), background)
        sheet.paste(resized, (-placement.left, -placement.top))
        return sheet
    left, top = placement.left, placement.top
    return resized.crop((left, top, left + bucket.width, top + bucket.height))
