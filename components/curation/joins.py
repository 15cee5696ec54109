"""Joins over all pairs without an index library: 64-bit hashes by Hamming distance, feature rows by cosine.

Both are plain arithmetic: exact bucket joins for hashes, matrix products within k-means cells for features. Equal items
are collapsed first, so that a folder of copies does not make them quadratic.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

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
FILTER_BLOCK = 256            # the same in the reduced rows, small enough to stay in the processor's cache
CELLS_OF_A_ROW = 8            # rows are compared where they share a k-means cell; more cells find more pairs
REDUCED = 64                  # principal directions, in which most pairs are seen to be too far apart
MANY_CANDIDATES = 0.02        # share of a block's pairs from which on the whole product is cheaper than one by one
CANDIDATES = 65_536           # pairs verified at once
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

    Exact up to 20,000 distinct rows. Above, rows are compared within k-means cells, each row in its eight nearest,
    which at 0.95 finds more than 99.9 % of the pairs. Equal rows are treated as equal hashes are; zeros pair with none.
    """
    x = np.asarray(features)
    if not 0 < threshold <= 1:
        raise BadInput(f"threshold is {threshold}: expected a cosine above 0 and at most 1")
    rows, length = _unit_rows(x)
    kept = np.flatnonzero(length)
    group, first = _equal_rows(rows)
    _keep_rows(rows, first)
    distinct = kept[first]

    def settle(near: Pairs) -> Pairs:
        i, j = distinct[near.T]
        products = np.einsum("ij,ij->i", x[i], x[j], dtype=np.float64)
        return near[products >= threshold * length[i] * length[j]]

    near = _near_rows(rows[:len(first)], threshold - SLACK, seed)
    settled = [settle(part) for part in np.array_split(near, 1 + len(near) // CANDIDATES)]
    return _ascending(kept[expand_copies(np.concatenate(settled), group)])


def nearest_distances(features: ArrayLike, neighbours: int, *, seed: int = 0) -> NDArray[np.float64]:
    """Mean distance 1 - cosine of each row (n, d) to its nearest `neighbours` other rows, (n,).

    Exact up to 20,000 rows; above, neighbours are looked for in each row's two nearest k-means cells. A row without
    any, and one of zeros, has distance 1.
    """
    rows, length = _unit_rows(np.asarray(features))
    distances = np.ones(len(length))
    if len(rows) <= BRUTE_FORCE_ROWS:
        nearest, _ = _most_similar(rows, neighbours)
    else:
        nearest = _most_similar_in_cells(rows, neighbours, seed)
    found = np.isfinite(nearest)
    mean = np.where(found, nearest, 0).sum(axis=1) / np.maximum(found.sum(axis=1), 1)
    distances[np.flatnonzero(length)] = np.where(found.any(axis=1), np.maximum(1 - mean, 0), 1)
    return distances


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


def _unit_rows(x: NDArray[Any]) -> tuple[Rows, NDArray[np.float64]]:
    """The rows that are not zero, of length 1, and the lengths of all, (n,). No more than one copy is ever held."""
    if x.ndim != 2:
        raise BadInput(f"features have shape {x.shape}: expected (images, features); embed them again")
    length = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))
    if not np.isfinite(length).all():
        raise BadInput(f"features of shape {x.shape} are not all finite; embed them again")
    kept = np.flatnonzero(length)
    rows = np.empty((len(kept), x.shape[1]), dtype=np.float32)
    for start in range(0, len(kept), BLOCK):
        block = kept[start:start + BLOCK]
        rows[start:start + BLOCK] = x[block] / length[block, None]
    return rows, length


def _equal_rows(rows: Rows) -> tuple[Indices, Indices]:
    """The group of equal rows that each belongs to, (n,), numbered by first appearance, and each group's first row.

    Rows are told apart by 128 bits of BLAKE2b: sorting them whole would cost three more copies.
    """
    number: dict[bytes, int] = {}
    group = np.fromiter((number.setdefault(hashlib.blake2b(row, digest_size=16).digest(), len(number)) for row in rows),
                        dtype=np.int64, count=len(rows))
    return group, np.flatnonzero(np.diff(np.maximum.accumulate(group), prepend=-1))


def _keep_rows(rows: Rows, ascending: Indices) -> None:
    """Move the rows of `ascending` to the front, in place."""
    if len(ascending) < len(rows):
        for start in range(0, len(ascending), BLOCK):
            block = ascending[start:start + BLOCK]
            rows[start:start + len(block)] = rows[block]


def _near_rows(rows: Rows, threshold: float, seed: int) -> Pairs:
    if len(rows) <= BRUTE_FORCE_ROWS:
        return np.concatenate([_no_pairs(), *_cosine_blocks(rows, threshold)])
    reduced = _reduced(rows, seed)
    found = [np.empty(0, dtype=np.int64)]
    for members in _cells(_nearest_cells(reduced, CELLS_OF_A_ROW, seed)):
        for local in _filtered_blocks(rows, reduced[members], members, threshold):
            i, j = members[local].T
            found.append(i * len(rows) + j)
    i, j = np.divmod(np.unique(np.concatenate(found)), len(rows))
    return np.column_stack([i, j])


def _reduced(rows: Rows, seed: int) -> Rows:
    """Rows (n, d) in their principal directions, (n, 64): no two are farther apart there than they are in full."""
    d = rows.shape[1]
    if d <= 2 * REDUCED:
        return rows
    sample = rows[np.random.default_rng(seed).choice(len(rows), min(len(rows), 16 * d), replace=False)]
    _, directions = np.linalg.eigh(sample.T @ sample)                    # ascending
    basis = np.ascontiguousarray(directions[:, -REDUCED:])
    return np.concatenate([block @ basis for block in _blocks(rows)])


def _filtered_blocks(rows: Rows, reduced: Rows, members: Indices, threshold: float) -> Iterator[Pairs]:
    """Pairs of `members` whose cosine is at least `threshold`, as positions in `members`.

    |x - y|^2 = 2 - 2 cosine is no smaller than it is in the reduced rows, so that those part most pairs for an eighth
    of the work and no near pair is lost.
    """
    half = np.square(reduced).sum(axis=1, keepdims=True) / 2
    one = np.ones_like(half)
    left, right = np.hstack([reduced, one, half]), np.hstack([reduced, -half, -one])
    for start in range(0, len(members), FILTER_BLOCK):
        candidates = left[start:start + FILTER_BLOCK] @ right[start:].T >= threshold - 1 - SLACK   # -|x - y|^2 / 2
        if np.count_nonzero(candidates) > MANY_CANDIDATES * candidates.size:
            near = rows[members[start:start + FILTER_BLOCK]] @ rows[members[start:]].T >= threshold
            yield _upper(near, start)
            continue
        maybe = _upper(candidates, start)
        for part in np.array_split(maybe, 1 + len(maybe) // CANDIDATES):
            i, j = members[part.T]
            yield part[np.einsum("ij,ij->i", rows[i], rows[j]) >= threshold]


def _cells(nearest: Indices) -> Iterator[Indices]:
    """Members of each cell, ascending, from each row's cells (n, c)."""
    row, cell = np.tile(np.arange(len(nearest)), nearest.shape[1]), nearest.T.ravel()
    order = np.lexsort((row, cell))
    ends = np.searchsorted(cell[order], np.arange(cell.max() + 2))
    yield from (row[order[start:end]] for start, end in pairwise(ends))


def _most_similar(rows: Rows, neighbours: int) -> tuple[NDArray[np.float32], Indices]:
    """Cosines and numbers of each row's most similar other rows, both (n, k); -inf and -1 where there are fewer."""
    n, k = len(rows), min(neighbours, max(len(rows) - 1, 0))
    cosines = np.full((n, neighbours), -np.inf, dtype=np.float32)
    numbers = np.full((n, neighbours), -1, dtype=np.int64)
    for start in range(0, n if k else 0, BLOCK):
        block = rows[start:start + BLOCK] @ rows.T
        here = np.arange(len(block))
        block[here, here + start] = -np.inf
        best = np.argpartition(-block, k - 1, axis=1)[:, :k]
        cosines[start:start + BLOCK, :k] = np.take_along_axis(block, best, axis=1)
        numbers[start:start + BLOCK, :k] = best
    return cosines, numbers


def _most_similar_in_cells(rows: Rows, neighbours: int, seed: int) -> NDArray[np.float32]:
    """Cosines of each row's most similar rows (n, k) among those that share one of its two cells."""
    cells = _nearest_cells(_reduced(rows, seed), 2, seed)               # (n, 2)
    cosines = np.full((len(rows), 2, neighbours), -np.inf, dtype=np.float32)
    numbers = np.full((len(rows), 2, neighbours), -1, dtype=np.int64)
    for cell, members in enumerate(_cells(cells)):
        best, local = _most_similar(rows[members], neighbours)
        place = (cells[members, 1] == cell).astype(np.int64)
        cosines[members, place], numbers[members, place] = best, np.where(local >= 0, members[local], -1)
    twice = (numbers[:, 1, :, None] == numbers[:, 0, None, :]).any(axis=2)   # met in both cells: counted once
    cosines[:, 1][twice] = -np.inf
    return -np.sort(-cosines.reshape(len(rows), -1), axis=1)[:, :neighbours]


def _cosine_blocks(rows: Rows, threshold: float) -> Iterator[Pairs]:
    for start in range(0, len(rows), BLOCK):
        yield _upper(rows[start:start + BLOCK] @ rows[start:].T >= threshold, start)


def _nearest_cells(rows: Rows, count: int, seed: int, iterations: int = 6) -> Indices:
    """Spherical k-means on a sample, about 2 sqrt(n) cells; each row's `count` most similar centres, (n, count)."""
    rng = np.random.default_rng(seed)
    cells = round(2 * len(rows) ** 0.5)
    count = min(count, cells)
    sample = rows[np.sort(rng.choice(len(rows), min(len(rows), 32 * cells), replace=False))]
    centres = sample[rng.permutation(len(sample))[:cells]]
    for _ in range(iterations):
        nearest = np.concatenate([(block @ centres.T).argmax(axis=1) for block in _blocks(sample)])
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(length > 0, sums / np.where(length > 0, length, 1), centres)
    # Copied, since a slice would keep each block's whole order in memory: 16 GB for a million rows.
    return np.concatenate([np.argpartition(-(block @ centres.T), count - 1, axis=1)[:, :count].copy()
                           for block in _blocks(rows)])


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
