import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from components.diffusion.schedules import (
    EDMPath,
    Path,
    PathPoint,
    StraightPath,
    VarianceExplodingSDE,
    VariancePreservingSDE,
    karras_sigmas,
    noise_schedule,
)
from components.errors import BaseModelError

CONFIGS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
]
T = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
PATHS: list[Path] = [
    noise_schedule(CONFIGS[1]), StraightPath(), VariancePreservingSDE(), VarianceExplodingSDE(), EDMPath()
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_schedules_agree_with_diffusers(config: dict):
    theirs = DDPMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(noise_schedule(config).alphas_cumprod, theirs, rtol=1e-3, atol=2e-6)


def test_the_signal_to_noise_ratio_falls_from_data_to_noise():
    schedule = noise_schedule(CONFIGS[1])
    snr = schedule.snr(torch.arange(1000))
    assert (snr.diff() < 0).all()
    torch.testing.assert_close(snr, schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))
    theirs = compute_snr(DDPMScheduler(**CONFIGS[1]), torch.arange(1000)).double()
    torch.testing.assert_close(snr, theirs, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(schedule.point(T).snr, snr[schedule.index(T)])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_on_every_path_noise_grows_against_signal_and_the_timestep_with_it(path: Path):
    point = path.point(T)
    assert (point.snr.diff() <= 0).all() and point.snr[0] > 20 and point.snr[-1] < 0.05
    assert (point.timestep.diff() >= 0).all() and point.timestep[-1] > point.timestep[0]


def test_times_cover_every_integer_timestep_equally():
    schedule = noise_schedule({})
    t = (torch.arange(2000) + 0.5) / 2000
    assert torch.equal(schedule.index(t).bincount(), torch.full((1000,), 2))
    assert schedule.index(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_a_zero_terminal_schedule_ends_without_signal_and_begins_as_before():
    plain, rescaled = (noise_schedule(config).alphas_cumprod for config in (CONFIGS[1], CONFIGS[3]))
    assert rescaled[-1] == 0 and (rescaled.diff() < 0).all()
    torch.testing.assert_close(rescaled[0], plain[0])


def test_an_unknown_schedule_is_an_error_that_names_the_known_ones():
    with pytest.raises(BaseModelError, match="'sigmoid', expected linear, scaled_linear or squaredcos_cap_v2"):
        noise_schedule({"beta_schedule": "sigmoid"})


def derivative(path: Path, what) -> torch.Tensor:
    h = 1e-6
    return (what(path.point(T + h)) - what(path.point(T - h))) / (2 * h)


def test_the_variance_preserving_sde_has_the_moments_of_its_drift_and_diffusion():
    path = VariancePreservingSDE()
    beta, point = 0.1 + 19.9 * T, path.point(T)
    torch.testing.assert_close(derivative(path, lambda p: p.signal.log()), -beta / 2, rtol=1e-6, atol=1e-6)
    # dx = f x dt + g dw makes d sigma^2 / dt = 2 f sigma^2 + g^2, here f = -beta / 2 and g^2 = beta
    growth = derivative(path, lambda p: p.sigma.square())
    torch.testing.assert_close(growth, beta * (1 - point.sigma.square()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(point.signal.square() + point.sigma.square(), torch.ones_like(T))


def test_the_variance_preserving_sde_is_the_limit_of_ddpm():
    """Coarse linear schedules come closer in proportion to the step, as a first-order rule should."""
    errors = []
    for count in (1000, 4000):
        betas = {"beta_schedule": "linear", "beta_start": 0.1 / count, "beta_end": 20 / count}
        discrete = noise_schedule(betas | {"num_train_timesteps": count}).alphas_cumprod.sqrt()
        t = torch.arange(1, count + 1, dtype=torch.float64) / count
        errors.append((discrete - VariancePreservingSDE().point(t).signal).abs().max().item())
    assert errors[0] < 3e-3 and errors[1] == pytest.approx(errors[0] / 4, rel=0.1)


def test_the_variance_exploding_sde_keeps_the_signal_and_multiplies_the_noise():
    path = VarianceExplodingSDE(sigma_min=0.01, sigma_max=50)
    ends = path.point(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends.sigma, torch.tensor([0.01, 0.5**0.5, 50], dtype=torch.float64))
    assert torch.equal(ends.signal, torch.ones(3, dtype=torch.float64))


def test_the_edm_path_hands_over_what_diffusers_hands_over():
    point, scheduler = EDMPath().point(T), EDMEulerScheduler()
    s = (T / (1 - T)).clamp(0.002, 80)
    for i in (0, 100, 500, 998):
        seen = scheduler.precondition_inputs(torch.tensor(1.0).double(), s[i])
        torch.testing.assert_close(point.signal[i], seen, rtol=1e-6, atol=0)
        torch.testing.assert_close(point.timestep[i], scheduler.precondition_noise(s[i]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(point.sigma / point.signal, s)
    variance = (point.signal * 0.5).square() + point.sigma.square()  # of data of standard deviation sigma_data
    torch.testing.assert_close(variance, torch.ones_like(T))


@pytest.mark.parametrize("num_steps", [2, 18, 40])
def test_karras_sigmas_agree_with_diffusers(num_steps: int):
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(karras_sigmas(num_steps), scheduler.sigmas[:-1].double(), rtol=1e-5, atol=1e-7)


def test_the_straight_path_is_that_of_diffusers_flow_matching():
    scheduler, generator = FlowMatchEulerDiscreteScheduler(), torch.Generator().manual_seed(0)
    x, noise = (torch.randn(5, 2, 2, 2, generator=generator) for _ in range(2))
    timesteps = scheduler.timesteps[[0, 250, 500, 750, 999]]
    point: PathPoint = StraightPath().point(timesteps / 1000)
    ours = point.signal.view(-1, 1, 1, 1) * x + point.sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(ours, scheduler.scale_noise(x, timesteps, noise))
    torch.testing.assert_close(point.timestep, timesteps)
