"""Where a picture's subject is, for `training.crop = "smart"`: small, without weights, the same on every machine."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from components.latents.buckets import Placement

SALIENCY_VERSION = 1  # raise when a window may come out elsewhere
CELLS = 64  # of the reduced copy, along the longer side of the window
TOLERANCE = 50  # windows that keep less than the best by a smaller part than this are as good


def salient_corner(image: Image.Image, placement: "Placement") -> tuple[int, int]:
    """Left and top of the window that keeps most of what stands out in an RGB image; of equals the nearest the centre.

    `placement` covers its bucket, so there is one way to move the window. Of windows that keep as much, give or take a
    fiftieth, the one with the least near its edges is taken, so that a subject is not left there when there is room.
    """
    across, down = placement.slack
    if across <= 0 and down <= 0:
        return placement.left, placement.top
    bucket = placement.bucket
    cell = max(bucket.width, bucket.height) / CELLS
    size = max(1, round(placement.width / cell)), max(1, round(placement.height / cell))
    energy = salience(image.resize(size, Image.Resampling.BOX))
    if across >= down:
        left = _best_offset(energy.sum(0), round(bucket.width / cell), across)
        return left, placement.top
    return placement.left, _best_offset(energy.sum(1), round(bucket.height / cell), down)


def salience(image: Image.Image) -> NDArray[np.int64]:
    """(h, w) integers: how far a pixel is from the picture's mean colour, and how strong an edge it is, in equal parts.

    The first is the saliency of Achanta et al. 2009, "Frequency-tuned Salient Region Detection", here in RGB and city
    block distance, the reduced copy standing for their blur; whole numbers leave no room for rounding. A flat picture
    has none.
    """
    rgb = np.asarray(image.convert("RGB"), dtype=np.int64)
    mean = rgb.sum((0, 1)) // (rgb.shape[0] * rgb.shape[1])
    contrast = np.abs(rgb - mean).sum(2)
    edges = np.zeros_like(contrast)
    across, down = np.abs(np.diff(rgb, axis=1)).sum(2), np.abs(np.diff(rgb, axis=0)).sum(2)
    edges[:, 1:] += across
    edges[:, :-1] += across
    edges[1:] += down
    edges[:-1] += down
    return contrast * edges.sum() + edges * contrast.sum()


def _best_offset(profile: NDArray[np.int64], window: int, slack: int) -> int:
    """The place in 0..slack of the window over `profile` that `salient_corner` is after."""
    window = min(max(1, window), len(profile))
    places = len(profile) - window
    if places == 0:
        return slack // 2
    sums = np.convolve(profile, np.ones(window, dtype=np.int64), "valid")
    good = np.flatnonzero(sums >= sums.max() - sums.max() // TOLERANCE)
    near = np.arange(1, window + 1)
    inner = np.convolve(profile, np.minimum(np.minimum(near, near[::-1]), window // 4 + 1), "valid")[good]
    best = good[inner == inner.max()]
    if len(best) == places + 1:
        return slack // 2
    chosen = min(best.tolist(), key=lambda place: (abs(2 * place - places), place))
    return round(chosen * slack / places)
