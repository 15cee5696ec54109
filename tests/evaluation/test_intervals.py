"""Intervals cover what they say, by prompts and not by images, and KID's draws are neither biased nor re-embedded."""

import math

import numpy as np
import pytest
from scipy import stats

from components.errors import BadInput
from components.evaluation.intervals import (
    Interval,
    KidBlocks,
    kid_blocks,
    kid_difference_interval,
    kid_interval,
    log_ratio_interval,
    mean_interval,
    paired_difference_interval,
    rate_interval,
    ratio_interval,
)
from components.evaluation.metrics import kid


def clustered(seed: int, prompts: int, seeds: int, icc: float = 0.5) -> tuple[np.ndarray, list[int]]:
    """Unit-variance values with mean 0 whose correlation within a prompt is `icc`."""
    g = np.random.default_rng(seed)
    values = math.sqrt(icc) * g.normal(size=(prompts, 1)) + math.sqrt(1 - icc) * g.normal(size=(prompts, seeds))
    return values.ravel(), np.repeat(np.arange(prompts), seeds).tolist()


def covers(found: Interval, truth: float) -> bool:
    return found.low <= truth <= found.high


# Means

def test_below_40_prompts_of_one_image_the_interval_is_students_t():
    x = np.random.default_rng(0).normal(size=12)
    found = mean_interval(x, list(range(12)))
    low, high = stats.t.interval(0.95, 11, loc=x.mean(), scale=stats.sem(x))
    assert (found.value, found.low, found.high) == pytest.approx((x.mean(), low, high))
    assert (found.n, found.clusters) == (12, 12)


def test_below_40_prompts_of_equal_size_the_interval_is_students_t_on_their_means():
    x, prompts = clustered(1, prompts=10, seeds=4)
    means = x.reshape(10, 4).mean(axis=1)
    found = mean_interval(x, prompts)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 9, loc=means.mean(), scale=stats.sem(means)))
    assert (found.n, found.clusters) == (40, 10)


def test_from_40_prompts_on_the_interval_is_the_bca_interval_of_an_independent_implementation():
    x = np.random.default_rng(2).exponential(size=60)
    found = mean_interval(x, list(range(60)), draws=20_000)
    oracle = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(3))
    width = found.high - found.low
    assert found.low == pytest.approx(oracle.confidence_interval.low, abs=0.04 * width)
    assert found.high == pytest.approx(oracle.confidence_interval.high, abs=0.04 * width)


@pytest.mark.parametrize(("prompts", "seeds"), [(15, 4), (50, 3)])
def test_intervals_cover_the_truth_although_images_of_a_prompt_resemble_each_other(prompts: int, seeds: int):
    trials = [clustered(seed, prompts, seeds) for seed in range(250)]
    by_prompt = np.mean([covers(mean_interval(x, c, draws=400), 0) for x, c in trials])
    by_image = np.mean([covers(mean_interval(x, list(range(len(x))), draws=400), 0) for x, c in trials])
    assert by_prompt > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 250)
    assert by_image < 0.88     # what an interval over images would have claimed to be 95 %


def test_a_paired_difference_takes_the_prompts_own_difficulty_out():
    g = np.random.default_rng(0)
    difficulty = 10 * g.normal(size=50)
    base, candidate = difficulty + 0.1 * g.normal(size=50), difficulty + 0.5 + 0.1 * g.normal(size=50)
    found = paired_difference_interval(candidate, base, list(range(50)))
    assert found.value == pytest.approx(0.5, abs=0.1) and found.high - found.low < 0.1
    mirrored = paired_difference_interval(base, candidate, list(range(50)))
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_equal_values_give_an_interval_without_width():
    for prompts in (5, 60):
        x = np.random.default_rng(0).normal(size=prompts)
        found = paired_difference_interval(x, x, list(range(prompts)))
        assert (found.value, found.low, found.high) == (0, 0, 0)


def test_one_prompt_says_nothing_about_others():
    found = mean_interval([1.0, 2.0], ["cat", "cat"])
    assert (found.value, found.low, found.high, found.clusters) == (1.5, -math.inf, math.inf, 1)


def test_a_seed_repeats_an_interval_and_the_order_of_images_does_not_matter():
    x, prompts = clustered(4, prompts=45, seeds=2)
    assert mean_interval(x, prompts, seed=1) == mean_interval(x, prompts, seed=1) != mean_interval(x, prompts, seed=2)
    order = np.argsort(np.arange(90) % 2, kind="stable")
    shuffled = mean_interval(x[order], [prompts[i] for i in order], seed=1)
    assert shuffled.low == pytest.approx(mean_interval(x, prompts, seed=1).low)


def test_values_that_cannot_be_used_are_refused():
    with pytest.raises(BadInput, match="2 entries for 3 images"):
        mean_interval([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(BadInput, match="one finite number per image"):
        mean_interval([1.0, math.nan], ["a", "b"])
    with pytest.raises(BadInput, match="same images on both sides"):
        paired_difference_interval([1.0], [1.0, 2.0], ["a"])


# Ratios and rates

def test_the_ratio_of_means_has_the_delta_methods_width():
    g = np.random.default_rng(0)
    denominator = g.uniform(1, 2, size=400)
    numerator = 0.8 * denominator + 0.1 * g.normal(size=400)
    found = ratio_interval(numerator, denominator, list(range(400)))
    ratio = numerator.mean() / denominator.mean()
    error = np.std(numerator - ratio * denominator) / denominator.mean() / math.sqrt(400)
    assert found.value == pytest.approx(ratio)
    assert (found.low, found.high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error)


def test_the_loss_ratio_is_a_geometric_mean_in_which_every_time_counts_the_same():
    base = np.tile([100.0, 1.0, 0.01], (30, 1))
    loss = base * [0.5, 1.0, 2.0]
    found = log_ratio_interval(loss, base, list(range(30)))
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert log_ratio_interval(loss[:, 0], base[:, 0], list(range(30))).value == pytest.approx(0.5)
    with pytest.raises(BadInput, match="values above 0"):
        log_ratio_interval([0.0], [1.0], ["a"])


@pytest.mark.parametrize(("hits", "n", "low", "high"), [
    (0, 100, 0, 0.0362), (5, 100, 0.0164, 0.1128), (10, 10, 0.6915, 1),
])
def test_rates_have_the_exact_binomial_interval(hits: int, n: int, low: float, high: float):
    found = rate_interval(hits, n)
    exact = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_a_limit_of_one_percent_takes_about_370_clean_images():
    assert rate_interval(0, 370).high <= 0.01 < rate_interval(0, 360).high


# KID

def gallery(seed: int, prompts: int = 20, seeds: int = 3, shift: float = 0.0) -> tuple[np.ndarray, list[int]]:
    g = np.random.default_rng(seed)
    x = shift + g.normal(size=(prompts, 1, 6)) + g.normal(size=(prompts, seeds, 6))
    return x.reshape(-1, 6), np.repeat(np.arange(prompts), seeds).tolist()


def blocks(images: np.ndarray, labels: list[int]) -> KidBlocks:
    return kid_blocks(images, REFERENCES, labels)


REFERENCES = 1.4 * np.random.default_rng(99).normal(size=(60, 6))


def test_kid_from_blocks_is_kid_of_the_images():
    x, prompts = gallery(0)
    found = kid_interval(blocks(x, prompts))
    assert found.value == pytest.approx(kid(x, REFERENCES), rel=1e-10)
    assert found.low < found.value < found.high and (found.n, found.clusters) == (60, 20)


def test_leaving_a_prompt_out_by_weight_equals_leaving_its_images_out():
    from components.evaluation.intervals import _kid_statistic

    x, prompts = gallery(0, prompts=5)
    left_out = _kid_statistic(blocks(x, prompts))(1 - np.eye(5))
    expected = [kid(x[np.array(prompts) != p], REFERENCES) for p in range(5)]
    assert left_out == pytest.approx(expected, rel=1e-9)


def test_drawing_a_prompt_twice_does_not_let_its_images_meet_themselves():
    from components.evaluation.intervals import _kid_statistic

    x, prompts = gallery(1, prompts=12, seeds=2)
    drawn = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=4000)
    values = _kid_statistic(blocks(x, prompts))(drawn.astype(float))
    error = values.std() / math.sqrt(4000)
    assert abs(values.mean() - kid(x, REFERENCES)) < 4 * error
    naive = [kid(x.reshape(12, 2, 6)[np.repeat(np.arange(12), w)].reshape(-1, 6), REFERENCES) for w in drawn[:400]]
    assert np.mean(naive) - kid(x, REFERENCES) > 5 * np.std(naive) / math.sqrt(400)   # copies counted as new images


@pytest.mark.parametrize("prompts", [20, 48])
def test_the_kid_difference_of_equally_good_models_covers_zero(prompts: int):
    found = []
    for seed in range(200):
        (a, labels), (b, _) = gallery(3 * seed, prompts), gallery(3 * seed + 1, prompts)
        found.append(kid_difference_interval(blocks(a, labels), blocks(b, labels), draws=400))
    assert np.mean([covers(interval, 0) for interval in found]) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200)


def test_the_kid_difference_shows_the_better_model_and_mirrors_when_swapped():
    (near, labels), (far, _) = gallery(0, 50), gallery(1, 50, shift=1.0)
    near_blocks, far_blocks = blocks(near, labels), blocks(far, labels)
    found = kid_difference_interval(near_blocks, far_blocks)
    assert found.value == pytest.approx(kid(near, REFERENCES) - kid(far, REFERENCES)) and found.high < 0
    mirrored = kid_difference_interval(far_blocks, near_blocks)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert kid_difference_interval(near_blocks, near_blocks) == Interval(0, 0, 0, 150, 50)


def test_kid_of_different_prompts_cannot_be_paired():
    x, labels = gallery(0)
    with pytest.raises(BadInput, match="same prompts"):
        kid_difference_interval(blocks(x, labels), blocks(x, [label + 1 for label in labels]))
