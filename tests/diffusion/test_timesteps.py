import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from components.config import TrainingConfig
from components.diffusion.draws import Draws
from components.diffusion.timesteps import (
    DENSITIES,
    MAX_MODE_SCALE,
    constant_shift,
    cosmap,
    dynamic_shift,
    logit_normal,
    mode,
    shift_of,
    shifted,
    stratified,
    uniform,
)
from components.diffusion.weighting import cosmap as cosmap_weight

U = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
DRAWN = Draws(11)(0, [str(i) for i in range(4000)]).uniform(4000)


def test_uniform_times_are_the_numbers_drawn():
    assert torch.equal(uniform(U), U)


@pytest.mark.parametrize(
    ("recipe", "distribution"),
    [
        ({"timestep_sampling": "uniform"}, stats.uniform.cdf),
        (
            {"timestep_sampling": "logit_normal", "logit_mean": 0.6, "logit_std": 1.5},
            lambda t: stats.norm.cdf(stats.logistic.ppf(t), 0.6, 1.5),
        ),
        # the integral of 2 / (pi - 2 pi t + 2 pi t^2)
        ({"timestep_sampling": "cosmap"}, lambda t: 2 / math.pi * np.arctan2(t, 1 - t)),
    ],
    ids=lambda value: value["timestep_sampling"] if isinstance(value, dict) else "",
)
def test_times_have_the_density_of_their_name(recipe: dict, distribution):
    t = DENSITIES[recipe["timestep_sampling"]](TrainingConfig(**recipe))(DRAWN)
    assert stats.kstest(t.numpy(), distribution).pvalue > 0.01
    assert stats.kstest((t**1.15).numpy(), distribution).pvalue < 0.01  # the test tells a wrong density


@pytest.mark.parametrize("scale", [-0.9, 0.5, 1.29])
def test_mode_times_have_the_density_that_diffusers_draws(scale: float):
    theirs = compute_density_for_timestep_sampling(
        "mode", 20_000, mode_scale=scale, generator=torch.Generator().manual_seed(0)
    )
    t = mode(DRAWN, scale=scale)
    assert stats.kstest(t.numpy(), theirs.numpy()).pvalue > 0.01
    assert stats.kstest(mode(DRAWN, scale=scale - 0.45 * math.copysign(1, scale)).numpy(), theirs.numpy()).pvalue < 0.01


def test_uniform_times_with_cosmap_weights_are_cosmap_times_without():
    """E over cosmap times of f(t) = E over uniform times of weight(t) f(t), for a loss that depends on t."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    weight = cosmap_weight(((1 - u) / u).square())
    for f in (torch.ones_like, torch.sin, torch.exp):
        torch.testing.assert_close(f(cosmap(u)).mean(), (weight * f(u)).mean(), rtol=1e-6, atol=0)


def test_cosmap_times_on_the_straight_path_have_the_log_snr_of_the_cosine_schedule():
    """Its SNR is cot^2(pi u / 2) at uniform u: Nichol & Dhariwal, without their offset."""
    t = cosmap(U)
    torch.testing.assert_close(((1 - t) / t).square(), torch.tan(math.pi * U / 2) ** -2)


def test_logit_normal_times_have_normal_logits():
    t = logit_normal(U, mean=0.5, std=2.0)
    logits = torch.logit(t)
    torch.testing.assert_close((logits - 0.5) / 2.0, torch.special.ndtri(U))


def test_the_median_of_logit_normal_times_is_the_sigmoid_of_the_mean():
    middle = torch.tensor([0.5])
    torch.testing.assert_close(logit_normal(middle, mean=1.2).float(), torch.sigmoid(torch.tensor([1.2])))


@given(st.floats(1e-12, 1 - 1e-12), st.floats(-2, 2), st.floats(0.1, 2))
def test_logit_normal_times_stay_between_data_and_noise(u: float, mean: float, std: float):
    assert 0 < logit_normal(torch.tensor([u], dtype=torch.float64), mean=mean, std=std).item() < 1


@pytest.mark.parametrize("density", [cosmap, *(lambda u, s=s: mode(u, scale=s) for s in (-1, 0, 1.29, MAX_MODE_SCALE))])
def test_times_rise_with_the_numbers_drawn_and_are_symmetric_about_the_middle(density):
    t = density(U)
    assert (t.diff() >= 0).all() and t[0] > 0 and t[-1] < 1
    torch.testing.assert_close(t + t.flip(0), torch.ones_like(t))


def test_parameters_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="std is 0"):
        logit_normal(U, std=0)
    with pytest.raises(ValueError, match=r"scale is 1.8, expected a number from -1 to 1.7519"):
        mode(U, scale=1.8)
    with pytest.raises(ValueError, match="'cubic', expected exponential or linear"):
        dynamic_shift((1, 4, 8, 8), time_shift_type="cubic")


def test_stratified_times_fall_into_one_stratum_each():
    t = stratified(torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert torch.equal((t * 16).long(), torch.arange(16))


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_shift_multiplies_the_odds_of_noise_so_shifts_compose_and_undo(one: float, other: float):
    t = shifted(U, one)
    torch.testing.assert_close(t / (1 - t), one * U / (1 - U))
    torch.testing.assert_close(shifted(t, other), shifted(U, one * other))
    torch.testing.assert_close(shifted(t, 1 / one), U)


def test_no_shift_leaves_every_bit():
    assert torch.equal(shifted(U, constant_shift((1, 4, 8, 8))), U)
    assert shift_of(TrainingConfig(), {}) is constant_shift


def test_a_shift_is_that_of_diffusers_flow_matching():
    plain, theirs = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    shift = shift_of(TrainingConfig(discrete_flow_shift=3.0), {})((1, 16, 128, 128))
    torch.testing.assert_close(shifted(plain.sigmas, shift), theirs.sigmas)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (96, 160)])
def test_a_dynamic_shift_is_that_of_diffusers_flux_pipeline(kind: str, size: tuple[int, int]):
    config = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3, "time_shift_type": kind}
    mu = calculate_shift(size[0] * size[1] // 4, base_shift=0.4, max_shift=1.3)
    theirs = FlowMatchEulerDiscreteScheduler(**config).time_shift(mu, 1.0, U)
    shift = shift_of(TrainingConfig(use_dynamic_shifting=True), config)((1, 16, *size))
    torch.testing.assert_close(shifted(U, shift), theirs)
