"""Joins over all pairs without an index library: 64-bit hashes by Hamming distance, feature rows by cosine.

Both are plain arithmetic: exact bucket joins for hashes, matrix products within k-means cells for features. Equal items
are collapsed first, so that a folder of copies does not make them quadratic.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from components.errors import BadInput

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]     # (m, 2), i < j, in ascending order
Indices = NDArray[np.int64]
Rows = NDArray[np.float32]    # (n, d) of length 1

BANDS = {1: 3, 2: 4, 3: 5, 4: 6, 5: 8, 6: 9, 7: 11, 8: 12}   # distance -> bands; above 8 brute force is no slower
FULL_COPIES = 512             # beyond so many equal items, one is paired with the first of them only
BRUTE_FORCE_HASHES = 3_000
BRUTE_FORCE_ROWS = 20_000
BLOCK = 2048                  # rows of a pairwise matrix in memory at once
SLACK = 1e-5                  # float32 products decide this far below the threshold; float64 then settles it


def hamming_pairs(hashes: Sequence[int] | Hashes, max_distance: int) -> Pairs:
    """Every pair of 64-bit hashes that differ in at most `max_distance` bits: rows (i, j), i < j, ascending.

    Exact, except that of more than 512 equal hashes the 513th and later are paired with the first one only: 100,000
    copies would be 5 billion pairs. Connected components stay what they are.
    """
    if not 0 <= max_distance <= 64:
        raise BadInput(f"max_distance is {max_distance}: expected 0 to 64 bits")
    values = np.asarray(hashes, dtype=np.uint64).reshape(-1)
    distinct, group = np.unique(values, return_inverse=True)
    return expand_copies(_distinct_hash_pairs(distinct, max_distance), group)


def cosine_pairs(features: ArrayLike, threshold: float, *, seed: int = 0) -> Pairs:
    """Every pair of rows (n, d) whose cosine is at least `threshold`: rows (i, j), i < j, ascending.

    Exact up to 20,000 distinct rows. Above, rows are compared within k-means cells, each row in its two nearest, which
    at 0.95 finds more than 99.9 % of the pairs. Equal rows are treated as equal hashes are; zeros pair with nothing.
    """
    x = np.asarray(features)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise BadInput(f"features have shape {x.shape}: expected (images, features), all finite; embed them again")
    if not 0 < threshold <= 1:
        raise BadInput(f"threshold is {threshold}: expected a cosine above 0 and at most 1")
    length = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))
    kept = np.flatnonzero(length)
    if not len(kept):
        return _no_pairs()
    rows = np.ascontiguousarray(x[kept] / length[kept, None], dtype=np.float32)
    _, first, group = np.unique(rows.view(f"V{rows.strides[0]}").ravel(), return_index=True, return_inverse=True)
    distinct = kept[first]

    def settle(near: Pairs) -> Pairs:
        i, j = distinct[near.T]
        products = np.einsum("ij,ij->i", x[i], x[j], dtype=np.float64)
        return near[products >= threshold * length[i] * length[j]]

    near = _near_rows(rows[first], threshold - SLACK, seed)
    settled = [settle(part) for part in np.array_split(near, 1 + len(near) // 65_536)]
    return _ascending(kept[expand_copies(np.concatenate(settled), group)])


def expand_copies(near: Pairs, group: Indices) -> Pairs:
    """Pairs of items from pairs of their groups: `group` (n,) numbers each item's group, `near` (k, 2) pairs groups.

    Items of one group pair with each other. A group of more than 512 is represented by its first item.
    """
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    members = {g: order[starts[g]:starts[g] + sizes[g]] for g in np.flatnonzero(sizes > 1).tolist()}
    found = [np.empty((0, 2), dtype=np.int64)]
    for items in members.values():
        if len(items) > FULL_COPIES:
            found.append(np.column_stack([np.full(len(items) - 1, items[0]), items[1:]]))
        else:
            found.append(items[np.column_stack(np.triu_indices(len(items), k=1))])
    single = (sizes[near] == 1).all(axis=1)
    found.append(order[starts[near[single]]])
    for a, b in near[~single].tolist():
        left, right = (members[g] if sizes[g] > 1 else order[starts[g]:starts[g] + 1] for g in (a, b))
        left, right = (items[:1] if len(items) > FULL_COPIES else items for items in (left, right))
        found.append(np.column_stack([np.repeat(left, len(right)), np.tile(right, len(left))]))
    return _ascending(np.concatenate(found))


def _distinct_hash_pairs(hashes: Hashes, max_distance: int) -> Pairs:
    """Exact self-join of distinct hashes. Cut into b bands, two hashes within R bits agree on b - R bands at least, so
    they meet in the bucket of some b - R bands; what meets is verified."""
    n = len(hashes)
    if max_distance == 0 or n < 2:
        return _no_pairs()
    if n <= BRUTE_FORCE_HASHES or max_distance not in BANDS:
        return np.concatenate([_no_pairs(), *_hash_blocks(hashes, max_distance)])
    found = [np.empty(0, dtype=np.int64)]
    for mask in _bucket_masks(BANDS[max_distance], max_distance):
        order = np.argsort(hashes & mask)
        buckets, values = hashes[order] & mask, hashes[order]
        alive = np.arange(n - 1)
        shift = 1
        while len(alive := alive[buckets[alive] == buckets[alive + shift]]):
            near = alive[np.bitwise_count(values[alive] ^ values[alive + shift]) <= max_distance]
            i, j = order[near], order[near + shift]
            found.append(np.minimum(i, j) * n + np.maximum(i, j))
            shift += 1
            alive = alive[alive < n - shift]
    i, j = np.divmod(np.unique(np.concatenate(found)), n)
    return np.column_stack([i, j])


def _bucket_masks(bands: int, max_distance: int) -> list[np.uint64]:
    edges = [round(64 * i / bands) for i in range(bands + 1)]
    masks = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(masks, bands - max_distance)]


def _hash_blocks(hashes: Hashes, max_distance: int) -> Iterator[Pairs]:
    for start in range(0, len(hashes), BLOCK):
        block = np.bitwise_count(hashes[start:start + BLOCK, None] ^ hashes[None, start:]) <= max_distance
        yield _upper(block, start)


def _near_rows(rows: Rows, threshold: float, seed: int) -> Pairs:
    if len(rows) <= BRUTE_FORCE_ROWS:
        return np.concatenate([_no_pairs(), *_cosine_blocks(rows, threshold)])
    cells = _two_nearest_cells(rows, seed)                              # (n, 2)
    row, cell = np.tile(np.arange(len(rows)), 2), cells.T.ravel()
    order = np.lexsort((row, cell))
    ends = np.searchsorted(cell[order], np.arange(cells.max() + 2))
    found = [np.empty(0, dtype=np.int64)]
    for start, end in pairwise(ends):
        members = row[order[start:end]]
        for local in _cosine_blocks(rows[members], threshold):
            i, j = members[local].T
            found.append(i * len(rows) + j)
    i, j = np.divmod(np.unique(np.concatenate(found)), len(rows))
    return np.column_stack([i, j])


def _cosine_blocks(rows: Rows, threshold: float) -> Iterator[Pairs]:
    for start in range(0, len(rows), BLOCK):
        yield _upper(rows[start:start + BLOCK] @ rows[start:].T >= threshold, start)


def _two_nearest_cells(rows: Rows, seed: int, iterations: int = 6) -> Indices:
    """Spherical k-means on a sample, about 2 sqrt(n) cells; then each row's two most similar centres, (n, 2)."""
    rng = np.random.default_rng(seed)
    cells = round(2 * len(rows) ** 0.5)
    sample = rows[rng.choice(len(rows), min(len(rows), 32 * cells), replace=False)]
    centres = sample[:cells].copy()
    for _ in range(iterations):
        nearest = np.concatenate([(block @ centres.T).argmax(axis=1) for block in _blocks(sample)])
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(length > 0, sums / np.where(length > 0, length, 1), centres)
    return np.concatenate([np.argpartition(-(block @ centres.T), 1, axis=1)[:, :2] for block in _blocks(rows)])


def _blocks(rows: Rows) -> Iterator[Rows]:
    return (rows[start:start + BLOCK] for start in range(0, len(rows), BLOCK))


def _upper(block: NDArray[np.bool_], start: int) -> Pairs:
    """Pairs (i, j), i < j, of a block of rows `start`... against the columns from `start` on."""
    i, j = np.nonzero(block)
    keep = i < j
    return np.column_stack([i[keep], j[keep]]) + start


def _ascending(pairs: Pairs) -> Pairs:
    pairs = np.sort(pairs, axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _no_pairs() -> Pairs:
    return np.empty((0, 2), dtype=np.int64)
