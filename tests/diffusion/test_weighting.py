"""A loss weight means the same whatever the network predicts."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from components.config import TrainingConfig
from components.diffusion.objectives import Objective
from components.diffusion.predictions import PREDICTIONS, convert, edm_prediction
from components.diffusion.schedules import noise_schedule
from components.diffusion.weighting import WEIGHTINGS, cosmap, debiased, min_snr, none, p2, sigma_sqrt, weighting_of

SNR = torch.logspace(-4, 4, 50, dtype=torch.float64)
TRAINING = TrainingConfig(loss_weighting="min_snr", snr_gamma=5.0)
P2 = TrainingConfig(loss_weighting="p2", p2_k=0.5, p2_gamma=0.7)


def of(name: str, prediction: str) -> Tensor:
    return WEIGHTINGS[name](P2 if name == "p2" else TRAINING).of(PREDICTIONS[prediction])(SNR)


@pytest.mark.parametrize("name", sorted(set(WEIGHTINGS) - {"none"}))
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(PREDICTIONS, 2)))
def test_a_weight_is_the_same_loss_on_the_data_whatever_is_predicted(name: str, one: str, other: str):
    on_data = [of(name, kind) * PREDICTIONS[kind].gain(SNR) for kind in (one, other)]
    torch.testing.assert_close(on_data[0], on_data[1], rtol=1e-9, atol=0)


def test_weights_are_the_formulas_of_their_papers():
    t = 1 / (1 + SNR.sqrt())
    torch.testing.assert_close(of("min_snr", "sample"), SNR.clamp(max=5))
    torch.testing.assert_close(of("min_snr", "v_prediction"), SNR.clamp(max=5) / (SNR + 1))
    torch.testing.assert_close(of("p2", "epsilon"), 1 / (0.5 + SNR) ** 0.7)
    torch.testing.assert_close(of("debiased", "epsilon"), 1 / SNR.sqrt())
    torch.testing.assert_close(of("sigma_sqrt", "flow_prediction"), 1 / t**2)
    torch.testing.assert_close(of("cosmap", "flow_prediction"), 2 / (math.pi * (1 - 2 * t + 2 * t**2)))
    s = SNR.rsqrt()
    torch.testing.assert_close(of("edm", "sample"), (s**2 + 0.5**2) / (s * 0.5) ** 2)


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_flow_weights_agree_with_diffusers(name: str):
    theirs = compute_loss_weighting_for_sd3(name, 1 / (1 + SNR.sqrt())).double()
    torch.testing.assert_close(of(name, "flow_prediction"), theirs, rtol=1e-6, atol=0)


def test_edm_weighting_is_1_for_edm_whatever_its_sigma_data():
    for prediction in (PREDICTIONS["edm"], edm_prediction(1.0)):
        assert torch.equal(WEIGHTINGS["edm"](TRAINING).of(prediction)(SNR), torch.ones_like(SNR))


def test_min_snr_has_the_bits_that_it_always_had():
    capped, tiny = SNR.clamp(max=5.0), torch.finfo(SNR.dtype).tiny
    assert torch.equal(of("min_snr", "epsilon"), capped / SNR.clamp_min(tiny))
    assert torch.equal(of("min_snr", "v_prediction"), capped / (SNR + 1))
    assert torch.equal(of("min_snr", "sample"), capped)


def test_special_cases_meet():
    """P2 with gamma 0 and Min-SNR with a huge gamma are the plain loss on the noise; debiased is P2 with k = 0."""
    assert torch.equal(p2(1.0, 0.0)(SNR), none(SNR))
    weight = WEIGHTINGS["min_snr"](TrainingConfig(snr_gamma=1e9)).of(PREDICTIONS["epsilon"])(SNR)
    torch.testing.assert_close(weight, none(SNR))
    torch.testing.assert_close(p2(1e-30, 0.5)(SNR), debiased(SNR))
    assert weighting_of(TrainingConfig(snr_gamma=5.0)).name == "min_snr"
    assert weighting_of(TrainingConfig()).of(PREDICTIONS["sample"]) is none


@pytest.mark.parametrize("name", ["min_snr", "p2", "debiased"])
def test_weights_of_v_are_finite_where_a_zero_terminal_schedule_has_no_signal(name: str):
    training = P2 if name == "p2" else TRAINING
    at_zero = WEIGHTINGS[name](training).of(PREDICTIONS["v_prediction"])(torch.zeros(1, dtype=torch.float64))
    assert at_zero == pytest.approx(0, abs=1e-100)


@dataclass(frozen=True)
class Guess:
    """A wrong model of the data, told in the words of any prediction."""

    said_in: str

    def __call__(self, x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        point = SCHEDULE.point((timestep + 0.5) / 1000)
        signal, sigma = (c.view(-1, 1, 1, 1) for c in (point.signal, point.sigma))
        x = torch.tanh(x_t)
        return convert(x, x_t, signal, sigma, source=PREDICTIONS["sample"], target=PREDICTIONS[self.said_in])


SCHEDULE = noise_schedule({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


@pytest.mark.parametrize("name", ["min_snr", "p2", "debiased", "edm"])
def test_one_model_has_one_weighted_loss_whatever_it_predicts(name: str):
    generator, t = torch.Generator().manual_seed(0), torch.linspace(0.01, 0.99, 12, dtype=torch.float64)
    x, noise = (torch.randn(12, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    losses = []
    for kind in ("epsilon", "sample", "v_prediction"):
        weight = WEIGHTINGS[name](P2 if name == "p2" else TRAINING).of(PREDICTIONS[kind])
        objective = Objective(prediction=PREDICTIONS[kind], path=SCHEDULE, weight=weight)
        losses.append(objective.at(Guess(kind), x, x, t, noise))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-6, atol=0)


def test_parameters_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="gamma is 0"):
        min_snr(0.0)
    with pytest.raises(ValueError, match="positive k"):
        p2(0.0, 1.0)


def test_flow_weights_have_the_shapes_that_their_names_promise():
    """sigma_sqrt falls to 1 at noise; cosmap is symmetric about the middle of the path, where it is largest."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    snr = ((1 - t) / t).square()
    assert (sigma_sqrt(snr).diff() < 0).all() and sigma_sqrt(torch.zeros(1)) == 1
    torch.testing.assert_close(cosmap(snr), cosmap(snr).flip(0))
    assert cosmap(snr).argmax() == 49
