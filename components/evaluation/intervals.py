"""95 % intervals that respect clusters: images of one prompt are not independent, so prompts are what is drawn again.

Every statistic here is a function of cluster weights w: ones give the estimate, multinomial counts a bootstrap draw, a
one set to 0 a leave-one-out value. The draws therefore cost a matrix product and no image is embedded twice.

Below 40 clusters the interval is the estimate +- t times the jackknife's standard error, from 40 on the bootstrap's BCa
(bias-corrected, accelerated) interval. With too few clusters to say anything the ends are -inf and +inf.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from components.errors import BadInput
from components.evaluation.features import Array, as_features, polynomial_kernel, require_label_each, require_same_width

DRAWS = 2000
LEVEL = 0.95                # two-sided: the interval that is shown is the one that decides
BOOTSTRAP_FROM = 40         # clusters; a percentile-type interval covers too little below

Statistic = Callable[[Array], Array]   # cluster weights (b, clusters) -> values (b,)


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its two-sided 95 % bounds, in the unit of the estimate."""

    value: float
    low: float
    high: float
    n: int          # images
    clusters: int   # prompts or concepts that were drawn again; what the width depends on

    def mirrored(self) -> "Interval":
        """Of the negative estimate: a difference in the other order."""
        return Interval(-self.value, -self.high, -self.low, self.n, self.clusters)

    def minus(self, constant: float) -> "Interval":
        return Interval(self.value - constant, self.low - constant, self.high - constant, self.n, self.clusters)


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of one value per image (n,), with one cluster label per image."""
    sums, counts = _sums_by_cluster([values], clusters)
    return _interval(lambda w: (w @ sums[0]) / (w @ counts), counts, draws=draws, seed=seed)


def paired_difference_interval(candidate: ArrayLike, reference: ArrayLike, clusters: Sequence[Hashable], *,
                               draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of candidate - reference over images that share prompt and seed: (n,), (n,) in the same order."""
    a, b = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise BadInput(f"{a.shape} values against {b.shape}: a paired difference needs the same images on both sides")
    return mean_interval(a - b, clusters, draws=draws, seed=seed)


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike, clusters: Sequence[Hashable], *, draws: int = DRAWS,
                   seed: int = 0) -> Interval:
    """mean(numerator) / mean(denominator) over the same images, (n,) and (n,): variety as a share of the base's."""
    sums, counts = _sums_by_cluster([numerator, denominator], clusters)
    if sums[1].sum() == 0:
        raise BadInput("the denominator's mean is 0, so the ratio says nothing; compare the difference")
    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(lambda w: (w @ sums[0]) / (w @ sums[1]), counts, draws=draws, seed=seed)


def log_ratio_interval(loss: ArrayLike, base_loss: ArrayLike, clusters: Sequence[Hashable], *, draws: int = DRAWS,
                       seed: int = 0) -> Interval:
    """exp(mean log(loss / base_loss)): below 1 is better than the base. Positive (n,) or (n, T), T times per image.

    A mean of the losses would be ruled by the times whose loss is large; each image and time counts the same here.
    """
    loss, base_loss = np.asarray(loss, dtype=np.float64), np.asarray(base_loss, dtype=np.float64)
    if loss.shape != base_loss.shape or loss.ndim not in (1, 2) or not (loss > 0).all() or not (base_loss > 0).all():
        raise BadInput(f"losses of shapes {loss.shape} and {base_loss.shape}: expected equal shapes and values above 0")
    log_ratio = np.log(loss / base_loss)
    found = mean_interval(log_ratio.mean(axis=1) if loss.ndim == 2 else log_ratio, clusters, draws=draws, seed=seed)
    with np.errstate(over="ignore"):
        value, low, high = np.exp([found.value, found.low, found.high]).tolist()
    return Interval(value, low, high, found.n, found.clusters)


def rate_interval(hits: int, n: int, *, clusters: int | None = None) -> Interval:
    """Share hits / n with the exact (Clopper-Pearson) interval, which covers at least 95 % at every n.

    0 of 100 gives [0, 0.036]: absence of copies in 100 images does not prove a rate below 3.6 %.
    """
    if not 0 <= hits <= n or n == 0:
        raise BadInput(f"{hits} hits of {n}: expected 0 <= hits <= n and n above 0")
    tail = (1 - LEVEL) / 2
    low = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(stats.beta.ppf(1 - tail, hits + 1, n - hits))
    return Interval(hits / n, low, high, n, n if clusters is None else clusters)


@dataclass(frozen=True, slots=True)
class KidBlocks:
    """Kernel sums by cluster, all that KID and its intervals need; m_c is the number of images in cluster c."""

    labels: tuple[Hashable, ...]   # (clusters,)
    counts: Array                  # (clusters,) m_c
    own: Array                     # (clusters,) sum of k over ordered pairs of different images of one cluster
    between: Array                 # (clusters, clusters) sum over pairs of two clusters; diagonal 0
    cross: Array                   # (clusters,) sum over an image and a reference, divided by the number of references
    reference: float               # mean of k over pairs of different references


def kid_blocks(images: ArrayLike, references: ArrayLike, clusters: Sequence[Hashable]) -> KidBlocks:
    """Kernel sums for `images` (n, d), one cluster label each, against `references` (m, d), which stay as they are."""
    x, y = as_features(images, "images", least=2), as_features(references, "references", least=2)
    require_same_width(x, y)
    labels, member = _membership(clusters, len(x))                      # member: (n, clusters) of 0 and 1
    kernel = polynomial_kernel(x, x)
    np.fill_diagonal(kernel, 0)
    blocks = member.T @ kernel @ member                                 # (clusters, clusters)
    own = np.diag(blocks).copy()
    np.fill_diagonal(blocks, 0)
    among = polynomial_kernel(y, y)
    return KidBlocks(
        labels=labels, counts=member.sum(axis=0), own=own, between=blocks,
        cross=member.T @ polynomial_kernel(x, y).mean(axis=1),
        reference=float((among.sum() - np.trace(among)) / (len(y) * (len(y) - 1))),
    )


def kid_interval(blocks: KidBlocks, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """KID with its interval over clusters; the value is `metrics.kid(images, references)`."""
    return _interval(_kid_statistic(blocks), blocks.counts, draws=draws, seed=seed)


def kid_difference_interval(candidate: KidBlocks, reference: KidBlocks, *, draws: int = DRAWS,
                            seed: int = 0) -> Interval:
    """KID(candidate) - KID(reference model), both drawn with the same clusters; below 0: the candidate is closer."""
    if candidate.labels != reference.labels or not np.array_equal(candidate.counts, reference.counts):
        raise BadInput("the models were not drawn for the same prompts, so KID cannot be paired; evaluate both again")
    of_candidate, of_reference = _kid_statistic(candidate), _kid_statistic(reference)
    return _interval(lambda w: of_candidate(w) - of_reference(w), candidate.counts, draws=draws, seed=seed)


def _kid_statistic(blocks: KidBlocks) -> Statistic:
    """KID of weighted clusters. A cluster that is drawn twice is one set of images, not two independent ones: were
    pairs across its copies counted, images would meet themselves and their siblings too often and KID would rise. So
    pairs of two clusters weigh w_c w_d, pairs inside one w_c: on average the draws then repeat the sample's own KID."""
    m = blocks.counts

    def statistic(w: Array) -> Array:                                   # (b, clusters) -> (b,)
        pairs = (w @ m) ** 2 - (w * w) @ (m * m) + w @ (m * (m - 1))
        within = (((w @ blocks.between) * w).sum(axis=1) + w @ blocks.own) / pairs
        return within - 2 * (w @ blocks.cross) / (w @ m) + blocks.reference

    return statistic


def _interval(statistic: Statistic, counts: Array, *, draws: int, seed: int) -> Interval:
    clusters, n = len(counts), int(counts.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(np.ones((1, clusters)))[0])
        left_out = statistic(1.0 - np.eye(clusters))                    # (clusters,)
        if clusters < BOOTSTRAP_FROM or not np.isfinite(left_out).all():
            low, high = _t_bounds(value, left_out)
        else:
            weights = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)
            low, high = _bca_bounds(value, left_out, statistic(weights.astype(np.float64)))
    return Interval(value, low, high, n, clusters)


def _t_bounds(value: float, left_out: Array) -> tuple[float, float]:
    c = len(left_out)
    if c < 2 or not np.isfinite(left_out).all():
        return -np.inf, np.inf
    error = np.sqrt((c - 1) / c * np.square(left_out - left_out.mean()).sum())
    half = float(stats.t.ppf((1 + LEVEL) / 2, c - 1) * error)
    return value - half, value + half


def _bca_bounds(value: float, left_out: Array, drawn: Array) -> tuple[float, float]:
    """Bias-corrected and accelerated percentiles of the draws.    Source: scipy.stats._resampling, _bca_interval."""
    deviation = left_out.mean() - left_out
    spread = np.square(deviation).sum()
    if spread == 0 or np.ptp(drawn) == 0:
        return value, value
    acceleration = (deviation**3).sum() / (6 * spread**1.5)
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2      # ties count half
    bias = stats.norm.ppf(np.clip(below, 1 / len(drawn), 1 - 1 / len(drawn)))
    z = bias + stats.norm.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.quantile(drawn, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def _sums_by_cluster(columns: Sequence[ArrayLike], clusters: Sequence[Hashable]) -> tuple[list[Array], Array]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    for array in arrays:
        if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
            raise BadInput(f"values of shape {array.shape}: expected one finite number per image, at least one")
    _, member = _membership(clusters, len(arrays[0]))
    if any(len(array) != len(arrays[0]) for array in arrays):
        raise BadInput(f"{[len(array) for array in arrays]} values: expected the same images on both sides")
    return [array @ member for array in arrays], member.sum(axis=0)


def _membership(clusters: Sequence[Hashable], n: int) -> tuple[tuple[Hashable, ...], NDArray[np.float64]]:
    """Labels in order of first appearance, and who belongs where: (n, clusters) of 0 and 1."""
    require_label_each(n, clusters, "clusters")
    column = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    member = np.zeros((n, len(column)))
    member[np.arange(n), [column[label] for label in clusters]] = 1
    return tuple(column), member
