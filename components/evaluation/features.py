"""Feature rows: what every score accepts, and the distances and cosines between rows. All float64.

Rows are images: (n, d), one embedder's features. A set that is too small, a shape that does not fit and a value that is
not finite raise BadInput.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from components.errors import BadInput

Array = NDArray[np.float64]

BLOCK_ROWS = 2048   # rows of a pairwise matrix that are in memory at once
EXACT_WIDTH = 32    # up to this many dimensions distances come from differences, so that ties stay ties


def as_features(x: ArrayLike, name: str, *, least: int = 1) -> Array:
    """`x` as float64 (n, d). Raises BadInput when it is not that, holds fewer than `least` rows or is not finite."""
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise BadInput(f"{name} has shape {array.shape}; expected (images, features)")
    if len(array) < least:
        raise BadInput(f"{name} holds {len(array)} images; this score needs at least {least}")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise BadInput(f"{name} has {bad.sum()} rows that are not finite, first {bad.argmax()}; embed them again")
    return array


def as_unit_rows(x: ArrayLike, name: str, *, least: int = 1) -> Array:
    """`x` as float64 (n, d) with rows of length 1. Raises BadInput for a row of zeros: it has no direction."""
    array = as_features(x, name, least=least)
    length = np.linalg.norm(array, axis=1, keepdims=True)
    if not length.all():
        raise BadInput(f"row {int(length.argmin())} of {name} is all zeros and has no direction; embed it again")
    return array / length


def require_same_width(x: Array, y: Array) -> None:
    if x.shape[1] != y.shape[1]:
        raise BadInput(f"features are {x.shape[1]} and {y.shape[1]} wide; both sets must come from one embedder")


def require_label_each(rows: int, labels: Sequence[Hashable], name: str) -> None:
    if len(labels) != rows:
        raise BadInput(f"{name} has {len(labels)} entries for {rows} images; expected one each")


def cosine_kernel(x: ArrayLike, y: ArrayLike) -> Array:
    """Cosine of every pair, (n, m), in [-1, 1]."""
    x, y = as_unit_rows(x, "x"), as_unit_rows(y, "y")
    require_same_width(x, y)
    return np.clip(x @ y.T, -1, 1)


def polynomial_kernel(x: Array, y: Array) -> Array:
    """(x.y / d + 1)^3 of every pair, (n, m): the kernel of KID."""
    kernel = x @ y.T
    kernel /= x.shape[1]
    kernel += 1
    return kernel**3


def distances(x: Array, y: Array) -> Array:
    """Euclidean distance of every pair, (n, m)."""
    if x.shape[1] <= EXACT_WIDTH:
        return np.asarray(cdist(x, y), dtype=np.float64)
    centre: Array = y.mean(axis=0)  # moves no distance and shrinks rounding
    x, y = x - centre, y - centre
    norms = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    squared: Array = norms - 2 * (x @ y.T)
    squared[squared < 1e-13 * norms] = 0  # below the rounding of the product form: equal rows
    return np.sqrt(squared, dtype=np.float64)


def kth_neighbour_distance(x: Array, k: int) -> Array:
    """Distance of each row to its k-th nearest other row, (n,)."""
    radius = np.empty(len(x))
    for start in range(0, len(x), BLOCK_ROWS):
        block = distances(x[start:start + BLOCK_ROWS], x)
        block[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf
        radius[start:start + len(block)] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return radius
