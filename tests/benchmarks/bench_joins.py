"""Duplicates at a million: the join of 64-bit hashes within 4 bits, and of 512 features at cosine 0.95.

Each join runs in a process of its own, whose peak memory counts the data as well. Both are held to brute force on a
sample of rows, and to the pairs that were planted. `BENCH_ITEMS` asks for fewer items than a million.
"""

import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.curation.joins import cosine_pairs, hamming_pairs
from tests.benchmarks.paired import Run, answer, child, peak_memory_mb

ITEMS = 1_000_000
BITS, COSINE = 4, 0.95
FEATURES = 512
PLANTED = 0.1                 # share of items that are twins of another one
SAMPLE = {"hashes": 1_000, "features": 200}   # rows compared with all others by brute force
MARGIN = 1e-5                 # cosines this close to the threshold are not held against the join
BLOCK = 8192
MEMORY_MB = 8 * 1024


def planted_hashes(n: int, seed: int) -> NDArray[np.uint64]:
    """Random hashes; a tenth are others with up to 6 bits flipped, and a hundredth are equal to others."""
    g = np.random.default_rng(seed)
    hashes = g.integers(0, 2**64, n, dtype=np.uint64)
    chosen = g.permutation(n)[: 2 * round(n * PLANTED)].reshape(2, -1)
    flips = np.zeros(chosen.shape[1], dtype=np.uint64)
    for _ in range(6):
        flips |= np.where(g.random(len(flips)) < 0.7, np.uint64(1) << g.integers(0, 64, len(flips), dtype=np.uint64), 0)
    flips[: n // 100] = 0
    hashes[chosen[1]] = hashes[chosen[0]] ^ flips
    return hashes


def planted_features(n: int, d: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """Features with a spectrum like that of real embeddings, standard deviation k^-1/2 in direction k, and twins.

    Returns rows (n, d), the planted pairs (m, 2), i < j, and the cosine of each, uniform in 0.95 to 1.
    """
    g = np.random.default_rng(seed)
    spread = (1 / np.sqrt(np.arange(1, d + 1))).astype(np.float32)
    rows = np.empty((n, d), dtype=np.float32)
    for start in range(0, n, BLOCK):
        rows[start : start + BLOCK] = g.standard_normal((min(BLOCK, n - start), d), dtype=np.float32) * spread
    first, second = g.permutation(n)[: 2 * round(n * PLANTED)].reshape(2, -1)
    cosine = g.uniform(COSINE + MARGIN, 1, len(first))
    for start in range(0, len(first), BLOCK):
        part = slice(start, start + BLOCK)
        near = rows[first[part]]
        length = np.linalg.norm(near, axis=1, keepdims=True)
        near /= length
        aside = g.standard_normal(near.shape, dtype=np.float32) * spread
        aside -= (aside * near).sum(axis=1, keepdims=True) * near
        aside /= np.linalg.norm(aside, axis=1, keepdims=True)
        c = cosine[part, None]
        rows[second[part]] = (c * near + np.sqrt(1 - c**2) * aside) * length
    return rows, np.sort(np.column_stack([first, second]), axis=1), cosine


def join_hashes(n: int) -> Run:
    hashes = planted_hashes(n, seed=0)
    cpu, wall = time.process_time(), time.monotonic()
    pairs = hamming_pairs(hashes, BITS)
    found = spent(cpu, wall) | {"pairs": len(pairs), "peak_memory_mb": peak_memory_mb()}
    sample = np.random.default_rng(1).choice(n, min(n, SAMPLE["hashes"]), replace=False)
    wrong = 0
    for i in sample.tolist():
        near = np.bitwise_count(hashes ^ hashes[i]) <= BITS
        near[i] = False
        wrong += len(np.setxor1d(np.flatnonzero(near), partners(pairs, i)))
    return found | {"sampled_rows": len(sample), "differences_from_brute_force": wrong}


def join_features(n: int) -> Run:
    rows, planted, _ = planted_features(n, FEATURES, seed=0)
    cpu, wall = time.process_time(), time.monotonic()
    pairs = cosine_pairs(rows, COSINE)
    found = spent(cpu, wall) | {"pairs": len(pairs), "peak_memory_mb": peak_memory_mb()}
    key = pairs[:, 0] * n + pairs[:, 1]
    hit = np.isin(planted[:, 0] * n + planted[:, 1], key)
    length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    sample = np.random.default_rng(1).choice(n, min(n, SAMPLE["features"]), replace=False)
    cosine = np.concatenate(
        [(rows[sample] @ rows[s : s + BLOCK].T) / length[s : s + BLOCK] for s in range(0, n, BLOCK)], axis=1
    )
    cosine /= length[sample, None]
    cosine[np.arange(len(sample)), sample] = -1
    missed = invented = total = 0
    for row, i in enumerate(sample.tolist()):
        joined = partners(pairs, i)
        sure = np.flatnonzero(cosine[row] >= COSINE + MARGIN)
        total += len(sure)
        missed += len(np.setdiff1d(sure, joined))
        invented += len(np.setdiff1d(joined, np.flatnonzero(cosine[row] >= COSINE - MARGIN)))
    return found | {
        "planted": len(planted),
        "recall_of_planted": round(float(hit.mean()), 6),
        "sampled_rows": len(sample),
        "sampled_pairs": total,
        "missed": missed,
        "invented": invented,
    }


def partners(pairs: NDArray[np.int64], i: int) -> NDArray[np.int64]:
    return np.concatenate([pairs[pairs[:, 0] == i, 1], pairs[pairs[:, 1] == i, 0]])


def spent(cpu: float, wall: float) -> dict[str, Any]:
    return {"cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.monotonic() - wall, 2)}


def items() -> int:
    return int(os.environ.get("BENCH_ITEMS", ITEMS))


def test_a_million_hashes_are_joined_exactly_in_seconds():
    run = child("tests.benchmarks.bench_joins", {"join": "hashes", "items": items()})
    print(f"\n{run}")
    assert run["differences_from_brute_force"] == 0


def test_as_many_features_as_hashes_are_joined_in_less_than_8_gb():
    run = child("tests.benchmarks.bench_joins", {"join": "features", "items": items()})
    print(f"\n{run}")
    assert run["recall_of_planted"] >= 0.999 and run["invented"] == 0 and run["peak_memory_mb"] < MEMORY_MB


if __name__ == "__main__":
    answer(lambda asked: {"hashes": join_hashes, "features": join_features}[asked["join"]](asked["items"]))
