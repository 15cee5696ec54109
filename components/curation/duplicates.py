"""Near duplicates: perceptual hashes, exact and fast joins over all pairs, and groups that a chain cannot stretch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import fft
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from components.errors import BadInput

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]     # (m, 2), i < j, in ascending order

MIN_BITS, MAX_BITS = 6, 58    # hashes outside say nothing: a flat blue and a flat white picture share them
BANDS = {0: 1, 1: 3, 2: 4, 3: 5, 4: 6, 5: 8, 6: 9, 7: 11, 8: 12}   # distance -> bands; (4, 6, 8) timed at 1e6 hashes
FULL_COPIES = 512             # beyond so many equal hashes a picture is paired with the first of them only
BRUTE_FORCE_ROWS = 20_000     # up to here every cosine is computed; k-means cells pay off above
BLOCK = 2048


def phash(image: Image.Image) -> int:
    """64 bits of the low frequencies of the brightness, each above its median or not; `ImageHash.phash`'s bits.

    Robust to scaling and compression: 6 bits apart is a near duplicate. The first bit in reading order is the highest.
    """
    return int(_phash_bits(_luma(image, (32, 32))[None])[0])


def dhash(image: Image.Image) -> int:
    """64 bits: is each of 8 x 8 pixels brighter than its left neighbour; `ImageHash.dhash`'s bits."""
    return int(_dhash_bits(_luma(image, (9, 8))[None])[0])


def hash_images(images: Iterable[Image.Image]) -> tuple[Hashes, Hashes]:
    """pHash and dHash of many images, (n,) and (n,) uint64, with the transforms done for all of them at once."""
    small = [(_luma(image, (32, 32)), _luma(image, (9, 8))) for image in images]
    if not small:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)
    return _phash_bits(np.stack([p for p, _ in small])), _dhash_bits(np.stack([d for _, d in small]))


def hamming_distance(a: Hashes, b: Hashes) -> NDArray[np.int64]:
    """Bits in which a and b differ, element by element."""
    return np.bitwise_count(a ^ b).astype(np.int64)


def hamming_pairs(hashes: Sequence[int] | Hashes, max_distance: int) -> Pairs:
    """Every pair of 64-bit hashes that differ in at most `max_distance` bits: (m, 2) rows, i < j, ascending.

    Exact. Of more than 512 equal hashes the 513th and later are paired with the first of them only, so that a folder of
    100,000 copies is not 5 billion pairs; connected components do not change.
    Method: a pair within R of b bands agrees on b - R of them, so it shares a bucket for some choice of these.
    """
    values = np.asarray(hashes, dtype=np.uint64).reshape(-1)
    if not 0 <= max_distance <= 64:
        raise BadInput(f"max_distance is {max_distance}: expected 0 to 64 bits")
    distinct, group = np.unique(values, return_inverse=True)            # equal hashes are one
    near = _distinct_pairs(distinct, max_distance)
    return _expand(near, group, len(distinct))


def cosine_pairs(features: ArrayLike, threshold: float, *, seed: int = 0) -> Pairs:
    """Every pair of rows (n, d) whose cosine is at least `threshold`: (m, 2) rows, i < j, ascending.

    Exact up to 20,000 distinct rows; above, rows are compared within k-means cells, each row in its two nearest, which
    finds more than 99.9 % of pairs at 0.95. Equal rows are treated as equal hashes are. Rows of zeros pair with nothing.
    """
    x = np.asarray(features, dtype=np.float32)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise BadInput(f"features have shape {x.shape}: expected (images, features), all finite; embed them again")
    if not 0 < threshold <= 1:
        raise BadInput(f"threshold is {threshold}: expected a cosine above 0, at most 1")
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.ascontiguousarray(x / np.where(length > 0, length, 1))
    if not len(unit):
        return _no_pairs()
    _, first, group = np.unique(unit.view(np.void(0).dtype if not unit.shape[1] else f"V{unit.strides[0]}").ravel(),
                                return_index=True, return_inverse=True)
    return _expand(_unit_row_pairs(unit[first], threshold, seed), group, len(first), skip=(length.ravel() == 0)[first])
