"""Aspect buckets: the picture sizes that are trained, and which of them a picture goes to."""

import math
from dataclasses import dataclass

from PIL import Image

from components.errors import BadInput
from components.families.family import Geometry


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int


def buckets(resolution: int, geometry: Geometry, *, max_aspect: float = 2.0) -> tuple[Bucket, ...]:
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


def assign(width: int, height: int, sizes: tuple[Bucket, ...]) -> Bucket:
    """The bucket whose aspect ratio is nearest in log space; of equals the larger."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.width * b.height))


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Resize to cover the bucket (Lanczos), then crop the centre. A picture of the bucket's size is left as it is."""
    if image.size == (bucket.width, bucket.height):
        return image
    size, (left, top) = placement(image.width, image.height, bucket)
    resized = image.resize(size, Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + bucket.width, top + bucket.height))


def placement(width: int, height: int, bucket: Bucket) -> tuple[tuple[int, int], tuple[int, int]]:
    """What `fit` does to a picture: the (width, height) it is resized to, and the (left, top) of what is kept."""
    scale = max(bucket.width / width, bucket.height / height)
    size = (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale)))
    return size, ((size[0] - bucket.width) // 2, (size[1] - bucket.height) // 2)


def cropped_share(width: int, height: int, bucket: Bucket) -> float:
    """Share of a picture's area, 0 to 1, that `fit` cuts off."""
    scale = max(bucket.width / width, bucket.height / height)
    return 1.0 - bucket.width * bucket.height / (width * scale * height * scale)
