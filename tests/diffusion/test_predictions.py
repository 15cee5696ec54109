"""Predictions are linear in data and noise: what one of them says, the others can say."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import Tensor

from components.diffusion.predictions import PREDICTIONS, Prediction, convert, edm_prediction
from components.diffusion.schedules import EDMPath, Path, StraightPath, VarianceExplodingSDE, VariancePreservingSDE

PATHS: dict[str, Path] = {
    "variance-preserving": VariancePreservingSDE(),
    "variance-exploding": VarianceExplodingSDE(),
    "straight": StraightPath(),
    "edm": EDMPath(),
}
OWN_PATH = {"flow_prediction": "straight", "edm": "edm"}
T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(25, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, noise


def levels(path: Path) -> tuple[Tensor, Tensor]:
    point = path.point(T)
    return point.signal.view(-1, 1, 1, 1), point.sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_the_exact_prediction_of_one_kind_becomes_the_exact_prediction_of_another_and_back(
    path: str, source: str, target: str
):
    (x, noise), (signal, sigma) = pair(), levels(PATHS[path])
    x_t = signal * x + sigma * noise
    one, other = PREDICTIONS[source], PREDICTIONS[target]
    exact = one.of(x, noise, signal, sigma)
    converted = convert(exact, x_t, signal, sigma, source=one, target=other)
    torch.testing.assert_close(converted, other.of(x, noise, signal, sigma), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        convert(converted, x_t, signal, sigma, source=other, target=one), exact, rtol=1e-6, atol=1e-8
    )


def test_predictions_are_the_formulas_of_their_papers():
    x, noise = pair()
    signal, sigma = levels(PATHS["variance-preserving"])
    said = {name: prediction.of(x, noise, signal, sigma) for name, prediction in PREDICTIONS.items()}
    assert torch.equal(said["epsilon"], noise) and torch.equal(said["sample"], x)
    assert torch.equal(said["v_prediction"], signal * noise - sigma * x)
    assert torch.equal(said["flow_prediction"], noise - x)


def test_the_velocity_of_v_agrees_with_diffusers():
    x, noise = pair()
    scheduler, index = DDPMScheduler(), torch.arange(0, 1000, 40)
    alpha_cumprod = scheduler.alphas_cumprod[index].double().view(-1, 1, 1, 1)
    v = PREDICTIONS["v_prediction"].of(x, noise, alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt())
    torch.testing.assert_close(v, scheduler.get_velocity(x, noise, index), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_diffusers_preconditioning_of_the_exact_edm_output_is_the_data(sigma_data: float):
    x, noise = pair()
    scheduler, path = EDMEulerScheduler(sigma_data=sigma_data), EDMPath(sigma_data=sigma_data)
    s = path.point(T).sigma / path.point(T).signal
    output = edm_prediction(sigma_data).of(x, noise, *levels(path))
    for i, level in enumerate(s):
        denoised = scheduler.precondition_outputs(x[i] + level * noise[i], output[i], level)
        torch.testing.assert_close(denoised, x[i], rtol=1e-6, atol=1e-6)


def test_edm_output_for_data_of_variance_1_is_minus_v():
    (x, noise), (signal, sigma) = pair(), levels(EDMPath(sigma_data=1.0))
    output = edm_prediction(1.0).of(x, noise, signal, sigma)
    torch.testing.assert_close(output, -PREDICTIONS["v_prediction"].of(x, noise, signal, sigma))


@pytest.mark.parametrize("prediction", [*PREDICTIONS.values(), edm_prediction(1.3)], ids=lambda p: p.name)
def test_the_gain_is_the_squared_error_that_an_error_of_the_data_makes(prediction: Prediction):
    path = PATHS[OWN_PATH.get(prediction.name, "variance-preserving")]
    x, noise = pair()
    signal, sigma = levels(path)
    error = torch.full_like(x, 0.1)  # of x at the same x_t, so the noise is off by -signal / sigma of it
    wrong = prediction.of(x + error, noise - signal / sigma * error, signal, sigma)
    ratio = (wrong - prediction.of(x, noise, signal, sigma)).square() / error.square()
    gain = prediction.gain(path.point(T).snr).view(-1, 1, 1, 1)
    torch.testing.assert_close(ratio, gain.expand_as(ratio), rtol=1e-6, atol=1e-9)


def test_a_prediction_of_noise_says_nothing_about_the_data_where_there_is_no_signal():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert not PREDICTIONS["epsilon"].split(one, one, zero, one)[0].isfinite()
    assert PREDICTIONS["v_prediction"].split(-3 * one, one, zero, one)[0] == 3
