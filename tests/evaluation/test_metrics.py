"""Every score against closed forms, published values and theorems; nothing here is a number we once printed."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.linalg import sqrtm

from components.errors import BadInput
from components.evaluation.features import cosine_kernel
from components.evaluation.metrics import (
    auth_pct,
    clip_score,
    cmmd,
    copy_threshold,
    frechet_distance,
    frechet_distance_from_moments,
    kid,
    kid_subsets,
    nearest,
    prdc,
    prompt_diversity,
    retrieval_rank,
    style_similarity,
    vendi_score,
)

EXACT = {"rel": 1e-6, "abs": 1e-12}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Fréchet distance

@pytest.mark.parametrize(("mu2", "cov1", "cov2", "expected"), [
    ((3, 4), np.eye(2), np.eye(2), 25),
    ((0, 0, 0), np.diag([1, 4, 9]), np.diag([4, 9, 16]), 3),              # sum of (sqrt a - sqrt b)^2
    ((0, 0), [[2, 1], [1, 2]], np.diag([3, 1]), 8 - 2 * math.sqrt(14)),   # 2x2: tr sqrt M = sqrt(tr M + 2 sqrt det M)
])
def test_frechet_distance_of_moments_equals_the_closed_form(mu2, cov1, cov2, expected):
    mu1 = np.zeros(len(mu2))
    assert frechet_distance_from_moments(mu1, cov1, mu2, cov2) == pytest.approx(expected, **EXACT)
    assert frechet_distance_from_moments(mu2, cov2, mu1, cov1) == pytest.approx(expected, **EXACT)


def test_frechet_distance_of_samples_uses_covariances_with_ddof_1():
    x, y = rng(0).normal(size=(60, 5)), rng(1).normal(1, 2, size=(40, 5))
    cov1, cov2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov1 + cov2 - 2 * np.real(sqrtm(cov1 @ cov2)))
    assert frechet_distance(x, y) == pytest.approx(expected, **EXACT)


def test_frechet_distance_with_fewer_images_than_dimensions_equals_the_moments_form():
    x, y = rng(0).normal(size=(12, 30)), rng(1).normal(0.5, 1.5, size=(9, 30))
    moments = (x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance_from_moments(*moments), rel=1e-6)


def test_frechet_distance_is_zero_for_equal_sets_and_the_squared_shift_for_a_shifted_one():
    for shape in ((50, 4), (6, 20)):
        x = rng(2).normal(size=shape)
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
        assert frechet_distance(x, x + 2) == pytest.approx(4 * shape[1], rel=1e-6)


# KID and CMMD

def test_kid_equals_the_worked_example():
    x, y = np.eye(2), [[1, 1], [0, 0]]
    assert kid(x, y) == pytest.approx(-2.375, **EXACT)
    assert kid(x, y, unbiased=False) == pytest.approx(0.5625, **EXACT)


def test_kid_averages_to_zero_over_samples_of_one_distribution():
    draws = [kid(g.normal(size=(24, 8)), g.normal(size=(40, 8))) for g in map(rng, range(400))]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / math.sqrt(len(draws))
    assert min(draws) < 0


def test_kid_does_not_drift_with_the_number_of_images_while_the_biased_form_does():
    small = [kid(g.normal(size=(8, 4)), g.normal(0.5, 1, size=(8, 4))) for g in map(rng, range(500))]
    large = [kid(g.normal(size=(64, 4)), g.normal(0.5, 1, size=(64, 4))) for g in map(rng, range(1000, 1200))]
    error = math.hypot(np.std(small) / math.sqrt(500), np.std(large) / math.sqrt(200))
    assert abs(np.mean(small) - np.mean(large)) < 4 * error
    biased = [kid(g.normal(size=(8, 4)), g.normal(0.5, 1, size=(8, 4)), unbiased=False) for g in map(rng, range(500))]
    assert np.mean(biased) - np.mean(large) > 8 * error


def test_kid_of_many_rows_equals_the_sum_over_one_whole_kernel(monkeypatch: pytest.MonkeyPatch):
    x, y = rng(0).normal(size=(37, 6)), rng(1).normal(size=(29, 6))
    whole = kid(x, y)
    monkeypatch.setattr("components.evaluation.metrics.BLOCK_ROWS", 7)
    assert kid(x, y) == pytest.approx(whole, rel=1e-10)


def test_kid_over_full_size_subsets_is_kid_and_repeats_with_its_seed():
    x, y = rng(0).normal(size=(20, 5)), rng(1).normal(size=(20, 5))
    assert kid_subsets(x, y, subsets=3, subset_size=20, seed=0) == pytest.approx((kid(x, y), 0), abs=1e-12)
    assert kid_subsets(x, y, 5, 10, 7) == kid_subsets(x, y, 5, 10, 7) != kid_subsets(x, y, 5, 10, 8)
    with pytest.raises(BadInput, match="2 to 20 images"):
        kid_subsets(x, y, 5, 1000, 0)


@pytest.mark.parametrize(("cosine", "expected"), [
    (1, 0), (0.5, 9.97504161463536), (0, 19.900332501664), (-1, 39.602653386489),
])
def test_biased_cmmd_of_one_vector_each_equals_the_published_formula(cosine: float, expected: float):
    x, y = [[5.0, 0.0]], [[3 * cosine, 3 * math.sqrt(1 - cosine**2)]]   # lengths do not matter
    assert cmmd(x, y, unbiased=False) == pytest.approx(expected, **EXACT)


def test_unbiased_cmmd_needs_two_images_and_averages_to_zero_over_one_distribution():
    with pytest.raises(BadInput, match="at least 2"):
        cmmd([[1.0, 0.0]], [[1.0, 0.0]])
    draws = [cmmd(g.normal(size=(20, 6)), g.normal(size=(20, 6))) for g in map(rng, range(300))]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / math.sqrt(len(draws))


# Precision, recall, density, coverage

@pytest.mark.parametrize(("real", "fake", "expected"), [
    ([0, 1, 2, 3, 4], [0.25, 1.25, 2.25, 3.25, 4.25], (1, 1, 1.8, 1)),
    ([0, 1, 2, 3, 4], [2.1] * 5, (1, 0, 2, 0.4)),
    ([0, 1, 2, 3, 100], [60, 80, 101, 120, 140], (1, 0.2, 1, 0.2)),
])
def test_prdc_equals_the_reference_package_on_a_line(real, fake, expected):
    scores = prdc(np.array(real, dtype=float)[:, None], np.array(fake, dtype=float)[:, None], k=1)
    assert tuple(scores.values()) == pytest.approx(expected, **EXACT)
    assert list(scores) == ["precision", "recall", "density", "coverage"]


def test_density_and_coverage_of_one_distribution_have_their_known_expectations():
    n, k = 300, 5
    draws = [prdc(g.normal(size=(n, 16)), g.normal(size=(n, 16)), k) for g in map(rng, range(24))]
    coverage = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert 1 - math.prod((2000 - i) / (4000 - i) for i in range(1, 6)) == pytest.approx(0.968867, abs=5e-7)
    for name, expected in (("density", 1.0), ("coverage", coverage)):
        values = [draw[name] for draw in draws]
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(len(values))


def test_prdc_does_not_depend_on_blocks_nor_on_how_distances_are_computed(monkeypatch: pytest.MonkeyPatch):
    real, fake = rng(0).normal(size=(40, 20)), rng(1).normal(0.3, 1, size=(40, 20))
    whole = prdc(real, fake)
    for module in ("metrics", "features"):
        monkeypatch.setattr(f"components.evaluation.{module}.BLOCK_ROWS", 7)
    monkeypatch.setattr("components.evaluation.features.EXACT_WIDTH", 1)
    assert prdc(real, fake) == pytest.approx(whole, rel=1e-12)


# Variety

@pytest.mark.parametrize(("kernel", "expected"), [
    (np.exp(-np.abs(np.subtract.outer([0, 0, 10, 10, 20, 20], [0, 0, 10, 10, 20, 20]))), 2.9999999959),
    ([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]], 2.1573004834),
    (np.ones((5, 5)), 1),
    (np.eye(7), 7),
])
def test_vendi_score_counts_distinct_images(kernel, expected):
    assert vendi_score(kernel) == pytest.approx(expected, rel=1e-9)


def test_vendi_score_refuses_a_kernel_without_a_unit_diagonal():
    with pytest.raises(BadInput, match="normalise"):
        vendi_score(2 * np.eye(3))


def test_prompt_diversity_is_the_mean_of_one_minus_cosine_within_each_prompt():
    x = rng(3).normal(size=(7, 4))
    prompts = ["cat", "dog", "cat", "cat", "dog", "lone", "cat"]
    cats = [0, 2, 3, 6]
    cosine = cosine_kernel(x, x)
    expected = np.mean([1 - cosine[i, j] for a, i in enumerate(cats) for j in cats[a + 1:]])
    diversity = prompt_diversity(x, prompts)
    assert diversity == {"cat": pytest.approx(expected), "dog": pytest.approx(1 - cosine[1, 4])}
    assert prompt_diversity(np.ones((3, 4)), ["a"] * 3)["a"] == pytest.approx(0, abs=1e-12)


# Copying

def test_auth_pct_is_zero_for_copies_and_one_hundred_for_far_images():
    train = rng(0).normal(size=(30, 6))
    assert auth_pct(train, train[::2]) == 0
    assert auth_pct(train, train + 50) == 100
    assert auth_pct(train, np.vstack([train[:5], train[:15] + 50])) == 75


def test_nearest_finds_the_copied_image_and_the_threshold_flags_it():
    train, held_out = rng(0).normal(size=(50, 12)), rng(1).normal(size=(30, 12))
    threshold = copy_threshold(train, held_out)
    similarity, row = nearest(np.vstack([3 * train[17], held_out]), train)
    assert row[0] == 17
    assert similarity[0] == pytest.approx(1) and similarity[0] > threshold
    assert threshold == similarity[1:].max()   # below 1,000 held-out images: their maximum, which they never exceed


def test_the_copy_threshold_of_many_images_is_their_upper_quantile():
    train, held_out = rng(0).normal(size=(20, 4)), rng(1).normal(size=(2000, 4))
    flagged = (nearest(held_out, train)[0] > copy_threshold(train, held_out)).mean()
    assert flagged == pytest.approx(0.001)


# Prompt and style

def test_retrieval_rank_orders_concepts_by_their_best_reference():
    references = [[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0, 1]]
    concepts = ["cat", "cat", "dog", "cow"]
    queries = [[1, 0.1, 0], [0.8, 0.7, 0], [0, 0.6, 1]]
    assert retrieval_rank(queries, references, ["cat", "dog", "dog"], concepts).tolist() == [1, 2, 2]
    assert retrieval_rank(queries, references, ["cow", "cow", "cow"], concepts).tolist() == [3, 3, 1]


def test_features_that_say_nothing_get_the_worst_rank():
    assert retrieval_rank(np.ones((2, 3)), np.ones((4, 3)), ["a", "b"], ["a", "b", "c", "d"]).tolist() == [4, 4]


def test_a_prompt_without_a_reference_is_refused_by_name():
    with pytest.raises(BadInput, match="no reference image shows unicorn"):
        retrieval_rank(np.ones((1, 3)), np.ones((1, 3)), ["unicorn"], ["cat"])


def test_style_similarity_prefers_images_near_the_references_over_generic_ones():
    g = rng(0)
    style, generic = np.eye(8)[0], np.ones(8)
    references = style + 0.2 * g.normal(size=(30, 8))
    styled, plain = style + 0.2 * g.normal(size=(20, 8)), generic + 0.2 * g.normal(size=(20, 8))
    assert style_similarity(styled, references).min() > style_similarity(plain, references).max()


def test_style_similarity_of_an_image_does_not_depend_on_the_other_images_of_its_model():
    images, references = rng(1).normal(size=(12, 5)), rng(2).normal(size=(15, 5))
    together = style_similarity(images, references)
    assert together.shape == (12,)
    assert style_similarity(images[3:4], references) == pytest.approx(together[3:4])
    cosine = np.sort(cosine_kernel(images, references), axis=1)
    assert together == pytest.approx(2 * cosine.mean(axis=1) - cosine[:, 5:].mean(axis=1))


def test_clip_score_scales_the_cosine_and_cuts_at_zero():
    image, text = [[1.0, 0.0], [1.0, 0.0]], [[0.3, math.sqrt(1 - 0.09)], [-0.3, math.sqrt(1 - 0.09)]]
    assert clip_score(image, text) == pytest.approx([30, 0])
    assert clip_score(image, text, scale=2.5) == pytest.approx([0.75, 0])


# What is refused, and what is not imported

@pytest.mark.parametrize("score", [frechet_distance, kid, cmmd, prdc, auth_pct, nearest, cosine_kernel])
def test_features_of_two_embedders_are_refused(score):
    with pytest.raises(BadInput, match="8 and 9 wide"):
        score(rng().normal(size=(10, 8)), rng().normal(size=(10, 9)))


def test_rows_that_are_not_finite_or_have_no_direction_are_named():
    x = rng().normal(size=(10, 4))
    broken, empty = x.copy(), x.copy()
    broken[3, 1] = np.nan
    empty[6] = 0
    with pytest.raises(BadInput, match="1 rows that are not finite, first 3;"):
        kid(broken, x)
    with pytest.raises(BadInput, match="row 6 of x is all zeros"):
        cmmd(empty, x)
    with pytest.raises(BadInput, match="expected \\(images, features\\)"):
        kid(x[0], x)


def test_scores_intervals_and_gate_do_not_import_torch():
    code = ("import sys, components.evaluation.metrics, components.evaluation.intervals, components.evaluation.gate;"
            "print(sorted({'torch', 'transformers', 'prefect', 'mlflow'} & set(sys.modules)))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
