import pytest
import torch
from diffusers import DDPMScheduler

from components.diffusion.schedules import noise_schedule
from components.diffusion.weighting import min_snr, none
from components.errors import BaseModelError

CONFIGS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_schedules_agree_with_diffusers(config: dict):
    theirs = DDPMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(noise_schedule(config).alphas_cumprod, theirs, rtol=1e-3, atol=2e-6)


def test_the_signal_to_noise_ratio_falls_from_data_to_noise():
    schedule = noise_schedule(CONFIGS[1])
    snr = schedule.snr(torch.arange(1000))
    assert (snr.diff() < 0).all()
    torch.testing.assert_close(snr, schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))


def test_times_cover_every_integer_timestep_equally():
    schedule = noise_schedule({})
    t = (torch.arange(2000) + 0.5) / 2000
    assert torch.equal(schedule.index(t).bincount(), torch.full((1000,), 2))
    assert schedule.index(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_an_unknown_schedule_is_an_error_that_names_the_known_ones():
    with pytest.raises(BaseModelError, match="'sigmoid', expected linear, scaled_linear or squaredcos_cap_v2"):
        noise_schedule({"beta_schedule": "sigmoid"})


def test_min_snr_weights_mean_the_same_loss_on_the_data_whatever_is_predicted():
    snr = torch.logspace(-4, 4, 50, dtype=torch.float64)
    on_data = snr.clamp(max=5.0)
    # The same error of x seen in noise has SNR times the square, in v (SNR + 1) times.
    torch.testing.assert_close(min_snr(5.0, "sample")(snr), on_data)
    torch.testing.assert_close(min_snr(5.0, "epsilon")(snr) * snr, on_data)
    torch.testing.assert_close(min_snr(5.0, "v_prediction")(snr) * (snr + 1), on_data)
    assert torch.equal(none(snr), torch.ones_like(snr))


def test_min_snr_refuses_what_it_is_not_defined_for():
    with pytest.raises(ValueError, match="flow_prediction"):
        min_snr(5.0, "flow_prediction")
    with pytest.raises(ValueError, match="positive"):
        min_snr(0.0, "epsilon")
