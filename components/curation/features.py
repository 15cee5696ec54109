"""Near duplicates and strangers of a set by features of its pictures, which an embedder left in the cache."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from components.catalog.encodings import locate
from components.config import CurationConfig
from components.curation.checks import MIN_SET, Verdict, robust_z
from components.curation.joins import Rows, cosine_pairs, nearest_distances
from components.curation.judging import Measure, Subject, describe_work
from components.curation.profiles import Profile, Thresholds
from components.errors import StageFailed
from components.evaluation.model_sources import feature_key
from components.stages import Bench

NEAR_COSINE = 0.95          # of photographs' features, SemDeDup's and DINOv2's usual choice
HIGHEST_COSINE = 0.9999     # above, only copies of the same pixels are left
APART = 3.5                 # robust deviations, of the logarithm of distances to the nearest neighbour
NEIGHBOURS = 5


def embedded(bench: Bench, curation: CurationConfig, subjects: Sequence[Subject], measure: Measure) -> Rows:
    """(n, d) features of the subjects, in their order, by the recipe's embedder; pictures new to it are embedded."""
    assert curation.near_duplicate_embedder is not None
    encoder = feature_key(curation.near_duplicate_embedder)
    keys = [subject.rgb_digest for subject in subjects]
    if len(locate(bench.catalog, encoder, keys)) < len(set(keys)):
        measure(describe_work(bench, {}, curation.near_duplicate_embedder, subjects))
    return _rows(bench, encoder, keys)


def near_cosine(curation: CurationConfig, features: Rows, profile: Profile) -> float:
    """The cosine from which two pictures are near duplicates: the recipe's, 0.95 in photographs, else the set's own.

    Drawings of one style are all alike, so 0.95 says nothing there. Distances 1 - cosine to the nearest neighbour are
    then taken by their logarithm, and near is what lies 3.5 robust deviations below their median.
    """
    if curation.cosine_threshold != "auto":
        return curation.cosine_threshold
    if profile == "photo" or len(features) < MIN_SET:
        return NEAR_COSINE
    distance = np.log(np.maximum(nearest_distances(features, 1), 1 - HIGHEST_COSINE))
    spread = 1.4826 * float(np.median(np.abs(distance - np.median(distance))))
    own = 1 - float(np.exp(np.median(distance) - APART * spread))
    return min(max(own, NEAR_COSINE), HIGHEST_COSINE)


def judge_features(features: Rows, thresholds: Thresholds) -> list[Verdict | None]:
    """A flag for each picture that is unlike the rest of its set, by its mean distance to 5 neighbours; else None."""
    if len(features) < MIN_SET:
        return [None] * len(features)
    z, limit = robust_z(nearest_distances(features, NEIGHBOURS)), thresholds.unlike_others
    return [Verdict("unlike_others", float(score), limit, "flag",
                    f"Its nearest pictures are {score:+.1f} deviations farther than is usual in this set.")
            if score > limit else None for score in z]


def feature_pairs(features: Rows, threshold: float) -> list[tuple[int, int]]:
    return [(i, j) for i, j in cosine_pairs(features, threshold).tolist()]


def _rows(bench: Bench, encoder: str, keys: Sequence[str]) -> Rows:
    """Shard by shard, so that no more than the rows themselves and one shard are in memory."""
    places = locate(bench.catalog, encoder, keys)
    if missing := [key for key in keys if key not in places]:
        raise StageFailed(f"{len(missing)} pictures have no features; run the same command again")
    by_shard: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        by_shard.setdefault(places[key][0], []).append(i)
    rows: NDArray[np.float32] | None = None
    for shard, wanted in by_shard.items():
        held = load(bench.store.read(shard))["features"]                    # (m, d)
        rows = np.empty((len(keys), held.shape[1]), dtype=np.float32) if rows is None else rows
        rows[wanted] = held[[places[keys[i]][1] for i in wanted]]
    return rows if rows is not None else np.empty((0, 0), dtype=np.float32)
