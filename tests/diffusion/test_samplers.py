"""Samplers against data whose probability flow is known exactly: every one must end where the flow ends."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from components.diffusion.samplers import SAMPLERS, sampler_from_scheduler
from components.errors import BaseModelError
from tests.diffusion.exact import Data, Gaussian, Mixture, level, perfect_model, run

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
EDM = {"_class_name": "EDMEulerScheduler"}
KARRAS = SD15 | {"use_karras_sigmas": True}
V = {"prediction_type": "v_prediction"}


def orthogonal() -> Tensor:
    return torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]


GAUSSIAN = Gaussian(
    torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64),
    torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
    orthogonal(),
)
MIXTURE = Mixture(*torch.tensor([[0.3, 0.7], [-1.0, 1.0], [0.5, 0.4]], dtype=torch.float64))
DATA: dict[str, Data] = {"gaussian": GAUSSIAN, "mixture": MIXTURE}


def started(data: Data, config: dict[str, Any], scheduler: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, signal, sigma) where the sampler begins: points of the exact density there."""
    signal, sigma = level(config, scheduler.timesteps[0])
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(count, 3 if isinstance(data, Gaussian) else 1, generator=generator, dtype=torch.float64)
    return (data.noised(normal, signal, sigma) if isinstance(data, Gaussian) else normal), signal, sigma


@dataclass(frozen=True)
class Case:
    """A sampler on a base, its order (log-log slope of the error between 5 and 20 steps) and its error at 40 steps."""

    sampler: str
    base: str
    least_slope: float
    most_error: float  # root mean square, for data of standard deviation about 1


BASES = {"sd15": SD15, "sd15, karras": KARRAS, "sd15, karras, v": KARRAS | V, "flow": FLOW,
         "flow, shift 3": FLOW | {"shift": 3.0}, "edm": EDM}  # fmt: skip
CASES = [
    Case("ddim", "sd15", 0.8, 0.06),
    Case("euler", "sd15", 0.8, 0.06),
    Case("euler", "edm", 0.8, 0.1),
    Case("euler", "flow", 0.8, 0.06),
    Case("heun", "sd15", 1.8, 0.0025),
    Case("heun", "sd15, karras", 1.8, 0.004),
    Case("heun", "sd15, karras, v", 1.8, 0.004),
    Case("flow_euler", "flow", 0.8, 0.06),
    Case("flow_euler", "flow, shift 3", 0.8, 0.07),
    Case("flow_heun", "flow", 1.8, 0.0006),
    Case("flow_heun", "flow, shift 3", 1.8, 0.002),
    # multistep: their first steps are of first order, so that the slope between few steps promises less
    Case("dpmsolver++", "sd15", 0.8, 0.04),  # the last step is of first order too, and evenly spaced times make it long
    Case("dpmsolver++", "sd15, karras", 1.5, 0.004),
    Case("dpmsolver++", "flow", 1.5, 0.006),
    Case("dpmsolver++", "edm", 0.8, 0.015),
    Case("unipc", "sd15, karras", 2.0, 0.0015),
    Case("unipc", "flow", 1.5, 0.002),
]


@cache
def error(sampler: str, base: str, data: str, steps: int) -> float:
    """Root mean square distance from where the probability flow ends."""
    scheduler = sampler_from_scheduler(sampler, BASES[base])
    scheduler.set_timesteps(steps)
    x_t, signal, sigma = started(DATA[data], BASES[base], scheduler, 128)
    end = run(scheduler, perfect_model(BASES[base], DATA[data]), x_t)
    return (end - DATA[data].transported(x_t, signal, sigma)).square().mean().sqrt().item()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.sampler}, {case.base}")
def test_a_deterministic_sampler_ends_where_the_flow_ends_at_its_order(case: Case, data: str):
    errors = {steps: error(case.sampler, case.base, data, steps) for steps in (5, 20, 40)}
    assert math.log(errors[5] / errors[20], 4) > case.least_slope
    assert errors[40] < case.most_error


@pytest.mark.parametrize("sampler", ["heun", "unipc"])
def test_what_is_left_of_the_error_at_many_steps_is_the_last_jump_from_the_least_noise(sampler: str):
    """From sigma_min to 0 both take the denoised point, s^2 / (s^2 + sigma^2) of it, where the flow takes the root."""
    least = (1 - 0.99915) / 0.99915  # sigma^2 of timestep 0
    s = GAUSSIAN.std
    floor = (s.square() / (s.square() + least).sqrt() - s).square().mean().sqrt().item()
    assert error(sampler, "sd15, karras", "gaussian", 200) == pytest.approx(floor, rel=0.3)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmsolver++", "unipc"])
def test_a_sampler_does_the_same_whatever_a_perfect_model_predicts(sampler: str, kind: str):
    ends = []
    for prediction in ("epsilon", kind):
        config = SD15 | {"prediction_type": prediction}
        scheduler = sampler_from_scheduler(sampler, config)
        scheduler.set_timesteps(10)
        x_t, *_ = started(GAUSSIAN, config, scheduler, 32)
        ends.append(run(scheduler, perfect_model(config, GAUSSIAN), x_t))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)


def moments(sampler: str, config: dict[str, Any], steps: int, data: Gaussian, count: int) -> tuple[Tensor, Tensor]:
    scheduler = sampler_from_scheduler(sampler, config)
    scheduler.set_timesteps(steps)
    x_t, *_ = started(data, config, scheduler, count)
    end = run(scheduler, perfect_model(config, data), x_t)
    return end.mean(0), torch.cov(end.mT)


COUNT = 8000
SIGMAS = 4  # standard errors allowed


def test_ddpm_steps_with_the_forward_variance_keep_unit_gaussians_exactly():
    """For x ~ N(0, 1) the reverse kernel is Gaussian with variance beta, so any number of steps is unbiased."""
    data = Gaussian(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), orthogonal())
    config = SD15 | {"variance_type": "fixed_large"}
    mean, covariance = moments("ddpm", config, 20, data, COUNT)
    assert mean.abs().max() < SIGMAS * COUNT**-0.5
    # the last step adds no noise and leaves what was known at its timestep, a share alphas_cumprod of the variance
    assert (covariance - torch.eye(3)).abs().max() < SIGMAS * (2 / COUNT) ** 0.5 + 0.002


@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_has_the_moments_of_its_own_recursion(steps: int):
    """Ho et al., equation 7, at the sampler's timesteps: on a Gaussian every step is an affine map and a new noise."""
    scheduler = sampler_from_scheduler("ddpm", SD15)
    scheduler.set_timesteps(steps)
    bar = scheduler.alphas_cumprod.double()
    signal, sigma = level(SD15, scheduler.timesteps[0])
    s, mean = GAUSSIAN.std, torch.zeros(3, dtype=torch.float64)  # of x_t - signal * mean of the data, per axis
    variance = signal**2 * s**2 + sigma**2
    for t in scheduler.timesteps.tolist():
        now, before = bar[t], bar[t - 1000 // steps] if t >= 1000 // steps else torch.tensor(1.0).double()
        alpha = now / before
        gain = now.sqrt() * s**2 / (now * s**2 + 1 - now)
        step = before.sqrt() * (1 - alpha) / (1 - now) * gain + alpha.sqrt() * (1 - before) / (1 - now)
        variance = step**2 * variance + (1 - before) / (1 - now) * (1 - alpha)
    found_mean, covariance = moments("ddpm", SD15, steps, GAUSSIAN, COUNT)
    along = GAUSSIAN.axes.mT @ covariance @ GAUSSIAN.axes
    assert ((found_mean - GAUSSIAN.mean - mean) @ GAUSSIAN.axes).abs().div(variance.sqrt()).max() < SIGMAS * COUNT**-0.5
    assert (along.diag() / variance - 1).abs().max() < SIGMAS * (2 / COUNT) ** 0.5


@pytest.mark.parametrize(
    ("sampler", "base", "steps", "bias"),
    [
        ("euler_ancestral", "sd15", 100, 0.13),
        ("ddpm", "sd15", 100, 0.13),
        ("sde-dpmsolver++", "sd15, karras", 50, 0.03),
        ("sde-dpmsolver++", "flow", 50, 0.05),
        ("sde-dpmsolver++", "edm", 50, 0.05),
    ],
)
def test_a_stochastic_sampler_has_the_moments_of_the_data(sampler: str, base: str, steps: int, bias: float):
    """Within Monte-Carlo error and the stated bias of the variance at that number of steps, which is a few percent."""
    mean, covariance = moments(sampler, BASES[base], steps, GAUSSIAN, COUNT)
    assert ((mean - GAUSSIAN.mean) @ GAUSSIAN.axes).abs().div(GAUSSIAN.std).max() < SIGMAS * COUNT**-0.5
    scaled = (GAUSSIAN.axes.mT @ covariance @ GAUSSIAN.axes) / GAUSSIAN.std / GAUSSIAN.std[:, None]
    assert (scaled - torch.eye(3)).abs().max() < SIGMAS * (2 / COUNT) ** 0.5 + bias


@pytest.mark.parametrize(
    ("sampler", "stochastic"),
    [("ddpm", True), ("euler_ancestral", True), ("sde-dpmsolver++", True), ("ddim", False), ("dpmsolver++", False)],
)
def test_a_stochastic_sampler_forgets_where_it_began_and_a_deterministic_one_does_not(sampler: str, stochastic: bool):
    """The flow has the same moments, so moments alone cannot tell them apart."""
    scheduler = sampler_from_scheduler(sampler, SD15)
    ends = []
    for seed in (0, 1):
        scheduler.set_timesteps(10)
        x_t, *_ = started(GAUSSIAN, SD15, scheduler, 64)
        ends.append(run(scheduler, perfect_model(SD15, GAUSSIAN), x_t, seed=seed))
    assert ((ends[0] - ends[1]).std() > 0.5) == stochastic


def test_ddim_inversion_undoes_ddim_in_proportion_to_its_steps():
    x = GAUSSIAN.noised(torch.randn(64, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
                        torch.tensor(1.0).double(), torch.tensor(0.0).double())  # fmt: skip
    model, errors = perfect_model(SD15, GAUSSIAN), {}
    for steps in (10, 40):
        inverse, forward = (sampler_from_scheduler(name, SD15) for name in ("ddim_inverse", "ddim"))
        inverse.set_timesteps(steps)
        forward.set_timesteps(steps)
        noise = run(inverse, model, x)
        errors[steps] = (run(forward, model, noise) - x).square().mean().sqrt().item()
        # it is the noise: of the density at its time, not the data
        signal, sigma = level(SD15, forward.timesteps[0])
        expected = (signal**2 * GAUSSIAN.covariance + sigma**2 * torch.eye(3)).trace()
        assert torch.cov(noise.mT).trace() == pytest.approx(expected.item(), rel=0.35)
    assert math.log(errors[10] / errors[40], 4) > 0.8 and errors[40] < 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_built_for_every_path_it_names_and_refused_on_any_other(sampler: str):
    for config in (SD15, FLOW, EDM):
        try:
            scheduler = sampler_from_scheduler(sampler, config)
        except BaseModelError as refusal:
            assert f"sampler is {sampler!r}" in str(refusal) and "expected auto, " in str(refusal)
            assert "\n" not in str(refusal)
        else:
            assert type(scheduler).__name__ in SAMPLERS[sampler].classes.values()


@pytest.mark.parametrize(
    ("sampler", "config", "message"),
    [
        (
            "ddpm",
            FLOW,
            "'ddpm', .* predicts 'flow_prediction' on a rectified-flow path, expected auto, euler, dpmsolver",
        ),
        (
            "flow_heun",
            SD15,
            "'flow_heun', .* predicts 'epsilon' on a DDPM path, expected auto, ddpm, ddim",
        ),
        ("ddim", EDM, "on a EDM path, expected auto, euler"),
        (
            "euler_ancestral",
            SD15 | {"prediction_type": "sample"},
            "predicts 'sample' on a DDPM path, expected auto, ddpm, ddim, ddim_inverse, euler, heun, dpmsolver",
        ),
        ("plms", SD15, "sampler is 'plms', expected auto, ddpm"),
    ],
)
def test_a_sampler_that_does_not_fit_is_an_error_that_names_those_that_do(sampler: str, config: dict, message: str):
    with pytest.raises(BaseModelError, match=message):
        sampler_from_scheduler(sampler, config)


def test_auto_is_the_bases_own_scheduler():
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True} | SD15
    scheduler = sampler_from_scheduler("auto", config)
    assert type(scheduler).__name__ == "PNDMScheduler" and scheduler.config.skip_prk_steps


def test_latents_are_not_clipped_unless_the_base_says_so():
    """The default of diffusers' DDIM and DDPM is to clip x to [-1, 1], and other schedulers' configs say nothing."""
    for name in ("ddim", "ddpm", "ddim_inverse"):
        assert sampler_from_scheduler(name, SD15).config.clip_sample is False
        assert sampler_from_scheduler(name, SD15 | {"clip_sample": True}).config.clip_sample is True


def test_a_flow_base_keeps_its_shift_whichever_class_says_it():
    multistep = sampler_from_scheduler("dpmsolver++", FLOW | {"shift": 3.0})
    assert multistep.config.flow_shift == 3.0 and multistep.config.use_flow_sigmas
    back = sampler_from_scheduler("flow_euler", {**multistep.config})
    assert back.config.shift == 3.0
