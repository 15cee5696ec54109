"""Scores over features: distances between sets, spread, copying and retrieval. numpy and scipy only, float64 inside.

Everywhere `x`, `y`, `real`, ... are (n, d) arrays of features, one row per image; cosines are in [-1, 1]. What a score
says about pictures depends on the embedder that made the rows. A set that is too small, a shape that does not fit and a
value that is not finite raise BadInput.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from components.errors import BadInput
from components.evaluation.features import (
    BLOCK_ROWS,
    Array,
    as_features,
    as_unit_rows,
    cosine_kernel,
    distances,
    kth_neighbour_distance,
    polynomial_kernel,
    require_label_each,
    require_same_width,
)

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # _SIGMA and _SCALE of google-research cmmd/distance.py
COPY_QUANTILE = 0.999                  # of the similarities that honest, unseen images have to the training images


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """Fréchet distance between the Gaussians fitted to two sets (FID when the features are Inception's); 0 is best.

    Covariances use ddof 1. Far too high at small n, so it ranks only at equal n of 2,000 or more.
    Source: mseitzer/pytorch-fid, fid_score.py, with eigenvalues in place of a general matrix root.
    """
    x, y = as_features(x, "x", least=2), as_features(y, "y", least=2)
    require_same_width(x, y)
    mu1, mu2 = x.mean(axis=0), y.mean(axis=0)
    if max(len(x), len(y)) >= x.shape[1]:
        return frechet_distance_from_moments(mu1, _covariance(x), mu2, _covariance(y))
    # Fewer images than dimensions: with C1 = A^T A, C2 = B^T B, tr (C1 C2)^(1/2) is the nuclear norm of A B^T.
    a, b = ((z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float((mu1 - mu2) @ (mu1 - mu2) + (a * a).sum() + (b * b).sum() - 2 * cross)


def frechet_distance_from_moments(mu1: ArrayLike, cov1: ArrayLike, mu2: ArrayLike, cov2: ArrayLike) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) for means (d,) and covariances (d, d), which may be singular."""
    mu1, mu2, cov1, cov2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, cov1, cov2))
    d = len(mu1) if mu1.ndim == 1 else -1
    if mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        raise BadInput(f"moments are {mu1.shape}, {cov1.shape}, {mu2.shape}, {cov2.shape}; expected (d,) and (d, d)")
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov2 @ root), 0, None)).sum()
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def kid(x: ArrayLike, y: ArrayLike, *, unbiased: bool = True) -> float:
    """Kernel Inception distance over the full sets: squared MMD with the kernel (x.y / d + 1)^3.

    Unbiased it may be below 0, and its expectation does not depend on n; useful from about 50 images a side.
    Source: toshas/torch-fidelity, metric_kid.py (mmd2, polynomial_kernel).
    """
    least = 2 if unbiased else 1
    x, y = as_features(x, "x", least=least), as_features(y, "y", least=least)
    require_same_width(x, y)
    return _mmd2(x, y, polynomial_kernel, unbiased=unbiased)


def kid_subsets(x: ArrayLike, y: ArrayLike, subsets: int, subset_size: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0) of KID over random subsets without replacement, as other tools report it.

    The deviation describes subsets of that size; it is no standard error of the mean.
    """
    x, y = as_features(x, "x", least=2), as_features(y, "y", least=2)
    if subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
        raise BadInput(f"{subsets} subsets of {subset_size}: expected at least 1 of 2 to {min(len(x), len(y))} images")
    rng = np.random.default_rng(seed)
    draws = [
        kid(x[rng.choice(len(x), subset_size, replace=False)], y[rng.choice(len(y), subset_size, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(draws)), float(np.std(draws))


def cmmd(x: ArrayLike, y: ArrayLike, unbiased: bool = True) -> float:
    """CLIP-MMD: squared MMD with an RBF kernel (sigma 10) of rows normalised here, times 1000.

    `unbiased` leaves out each row's kernel with itself; False is the published estimate, whose floor grows as n falls.
    Source: google-research cmmd/distance.py (mmd).
    """
    least = 2 if unbiased else 1
    x, y = as_unit_rows(x, "x", least=least), as_unit_rows(y, "y", least=least)
    require_same_width(x, y)
    return CMMD_SCALE * _mmd2(x, y, _unit_rbf_kernel, unbiased=unbiased)


def prdc(real: ArrayLike, fake: ArrayLike, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage from k-nearest-neighbour balls; more is better, density may exceed 1.

    A ball's radius is the distance to the k-th neighbour, the point itself not counted; membership is strict (<).
    Compare only at equal n, from about 200 a side. Precision and recall are usually read at k = 3.
    Source: clovaai/generative-evaluation-prdc, prdc.py.
    """
    if k < 1:
        raise BadInput(f"k is {k}: expected at least 1")
    real, fake = as_features(real, "real", least=k + 1), as_features(fake, "fake", least=k + 1)
    require_same_width(real, fake)
    real_radius, fake_radius = kth_neighbour_distance(real, k), kth_neighbour_distance(fake, k)
    balls_hit = np.zeros(len(fake), dtype=np.int64)
    recalled, covered = np.zeros(len(real), dtype=bool), np.zeros(len(real), dtype=bool)
    for start in range(0, len(real), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        distance = distances(real[rows], fake)                          # (block, fake)
        balls_hit += (distance < real_radius[rows, None]).sum(axis=0)
        recalled[rows] = (distance < fake_radius).any(axis=1)
        covered[rows] = distance.min(axis=1) < real_radius[rows]
    return {
        "precision": float((balls_hit > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(balls_hit.mean() / k),
        "coverage": float(covered.mean()),
    }


def vendi_score(kernel: ArrayLike) -> float:
    """Effective number of distinct images: exp of the entropy of the eigenvalues of K / n, in [1, n].

    kernel: (n, n) positive semi-definite with a diagonal of ones, such as `cosine_kernel(x, x)`.
    Source: vertaix/Vendi-Score, vendi.py (score_K, order 1).
    """
    matrix = np.asarray(kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise BadInput(f"kernel has shape {matrix.shape}; expected (n, n)")
    if not np.allclose(np.diag(matrix), 1, atol=1e-6) or not np.allclose(matrix, matrix.T, atol=1e-6):
        raise BadInput("kernel is not symmetric with ones on its diagonal; normalise the rows of the features first")
    p = np.linalg.eigvalsh(matrix / len(matrix))
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def auth_pct(train: ArrayLike, generated: ArrayLike) -> float:
    """Percentage of generated images that are farther from their nearest training image than that one's own neighbour.

    100 says that nothing was copied, 0 that all was; it cannot tell a copy from a good likeness in a sparse region.
    Source: layer6ai-labs/dgm-eval, metrics/authpct.py.
    """
    train, generated = as_features(train, "train", least=2), as_features(generated, "generated")
    require_same_width(train, generated)
    sibling = kth_neighbour_distance(train, 1)                          # (train,)
    authentic = 0
    for start in range(0, len(generated), BLOCK_ROWS):
        distance = distances(generated[start:start + BLOCK_ROWS], train)
        authentic += int((sibling[distance.argmin(axis=1)] < distance.min(axis=1)).sum())
    return 100.0 * authentic / len(generated)


def retrieval_rank(queries: ArrayLike, references: ArrayLike, query_concepts: Sequence[Hashable],
                   reference_concepts: Sequence[Hashable]) -> NDArray[np.int64]:
    """Rank of the right concept when concepts are ordered by their reference that is most like the query; 1 is best.

    queries (n, d), references (m, d), one concept label per row of each. Returns (n,). Ties count against the query, so
    features that say nothing do not score. Raises BadInput when a query's concept has no reference.
    """
    cosine = cosine_kernel(queries, references)                         # (n, m)
    require_label_each(cosine.shape[0], query_concepts, "query_concepts")
    require_label_each(cosine.shape[1], reference_concepts, "reference_concepts")
    column = {concept: i for i, concept in enumerate(dict.fromkeys(reference_concepts))}
    missing = sorted({str(concept) for concept in query_concepts if concept not in column})
    if missing:
        raise BadInput(f"no reference image shows {', '.join(missing[:5])}; add references or drop these prompts")
    best = np.full((len(cosine), len(column)), -np.inf)                 # (n, concepts)
    for j, concept in enumerate(reference_concepts):
        np.maximum(best[:, column[concept]], cosine[:, j], out=best[:, column[concept]])
    right = best[np.arange(len(best)), [column[concept] for concept in query_concepts]]
    return (best >= right[:, None]).sum(axis=1)


def nearest(queries: ArrayLike, references: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """For each query the cosine to its most similar reference (n,) and that reference's row (n,): the copy check."""
    x, y = as_unit_rows(queries, "queries"), as_unit_rows(references, "references")
    require_same_width(x, y)
    similarity, row = np.empty(len(x)), np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        cosine = x[block] @ y.T
        similarity[block], row[block] = cosine.max(axis=1), cosine.argmax(axis=1)
    return np.clip(similarity, -1, 1), row


def copy_threshold(train: ArrayLike, held_out: ArrayLike) -> float:
    """Cosine above which an image counts as a copy: more like a training image than honest, unseen images are.

    The 99.9th percentile of the held-out images' similarity to their nearest training image; their maximum below 1,000.
    """
    similarity, _ = nearest(held_out, train)
    few = len(similarity) < 1 / (1 - COPY_QUANTILE)
    return float(similarity.max() if few else np.quantile(similarity, COPY_QUANTILE))


def prompt_diversity(features: ArrayLike, prompts: Sequence[Hashable]) -> dict[Hashable, float]:
    """Variety within each prompt: mean of 1 - cosine over the pairs of its images, in [0, 2]; 0 when all are alike.

    features (n, d), one prompt label per row; a prompt with a single image is left out.
    """
    x = as_unit_rows(features, "features")
    require_label_each(len(x), prompts, "prompts")
    members: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(row)
    return {prompt: _mean_pair_distance(x[rows]) for prompt, rows in members.items() if len(rows) > 1}


def style_similarity(images: ArrayLike, references: ArrayLike, neighbours: int = 10) -> Array:
    """2 mean cos - r per image (n,): how near it is to the references at large, beyond the few that show its subject.

    r is the image's mean cosine to its `neighbours` nearest references, the image's term of CSLS. The references' own
    term averages to one constant over the references, which no comparison of models sees; leaving it out makes values
    of different calls comparable.    Source: facebookresearch/MUSE, word_translation.py (csls_knn).
    """
    cosine = cosine_kernel(images, references)                          # (n, m)
    r = np.sort(cosine, axis=1)[:, -neighbours:].mean(axis=1)
    return 2 * cosine.mean(axis=1) - r


def clip_score(images: ArrayLike, texts: ArrayLike, scale: float = 100.0) -> Array:
    """scale * max(cosine, 0) of each image with its own text, (n,). Papers also use a scale of 2.5.

    Source: jmhessel/clipscore, clipscore.py (get_clip_score).
    """
    x, y = as_unit_rows(images, "images"), as_unit_rows(texts, "texts")
    if x.shape != y.shape:
        raise BadInput(f"images are {x.shape} and texts {y.shape}; expected one text per image, of equal width")
    return scale * np.clip((x * y).sum(axis=1), 0, 1)


def _mmd2(x: Array, y: Array, kernel: Callable[[Array, Array], Array], *, unbiased: bool) -> float:
    """Squared maximum mean discrepancy: the U-statistic, or the V-statistic, which counts each row with itself."""
    def mean(a: Array, b: Array, *, skip_self: bool = False) -> float:
        total = sum(float(kernel(a[i:i + BLOCK_ROWS], b).sum()) for i in range(0, len(a), BLOCK_ROWS))
        if not skip_self:
            return total / (len(a) * len(b))
        own = sum(float(kernel(row[None], row[None])[0, 0]) for row in a)
        return (total - own) / (len(a) * (len(a) - 1))

    return mean(x, x, skip_self=unbiased) + mean(y, y, skip_self=unbiased) - 2 * mean(x, y)


def _unit_rbf_kernel(x: Array, y: Array) -> Array:
    return np.exp((x @ y.T - 1) / CMMD_SIGMA**2)  # |x - y|^2 / (2 sigma^2), with |x - y|^2 = 2 - 2 x.y for unit rows


def _covariance(x: Array) -> Array:
    return np.atleast_2d(np.cov(x, rowvar=False))


def _mean_pair_distance(x: Array) -> float:
    """Mean of 1 - cosine over the pairs of unit rows (n, d): |sum of rows|^2 = n + twice the sum of their cosines."""
    n = len(x)
    cosines = (np.square(x.sum(axis=0)).sum() - n) / (n * (n - 1))
    return float(np.clip(1 - cosines, 0, 2))
