"""What a network may say at x_t = signal x + sigma noise, and how each way of saying it becomes any other.

Every prediction of the field is p = a x + b noise with coefficients that signal and sigma give, so together with x_t it
is two equations in two unknowns: p tells x and noise apart, and from these any other prediction follows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Coefficient = Tensor | float


@dataclass(frozen=True, slots=True)
class Prediction:
    """p = a x + b noise.

    `coefficients(signal, sigma)` gives (a, b). `gain(snr)` is the squared error of p for a squared error 1 of x at the
    same x_t, (a - b signal / sigma)^2, on the paths that the prediction is made for.
    """

    name: str
    coefficients: Callable[[Tensor, Tensor], tuple[Coefficient, Coefficient]]
    gain: Callable[[Tensor], Tensor]

    def of(self, x: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """The exact prediction. x, noise: (B, C, H, W); signal, sigma broadcast against them. Returns (B, C, H, W)."""
        a, b = self.coefficients(signal, sigma)
        return a * x + b * noise

    def split(self, prediction: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(x, noise), each (B, C, H, W), that a prediction at x_t means.

        Not finite where the prediction says nothing about one of them: epsilon at signal = 0, sample at sigma = 0.
        """
        a, b = self.coefficients(signal, sigma)
        determinant = b * signal - a * sigma
        return (b * x_t - sigma * prediction) / determinant, (signal * prediction - a * x_t) / determinant


def edm_prediction(sigma_data: float) -> Prediction:
    """The raw output F of an EDM-preconditioned network, for data of standard deviation `sigma_data`.

    With s = sigma / signal: F = (x - c_skip (x + s noise)) / c_out, c_skip = sigma_data^2 / (s^2 + sigma_data^2),
    c_out = s sigma_data / sqrt(s^2 + sigma_data^2). For sigma_data = 1 on a variance-preserving path F is -v.
    Source: Karras et al. 2022, arXiv:2206.00364, table 1.
    """

    def coefficients(signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        s = sigma / signal
        norm = (s.square() + sigma_data**2).sqrt()
        return s / (sigma_data * norm), -sigma_data / norm

    return Prediction("edm", coefficients, gain=lambda snr: snr + sigma_data**-2)


PREDICTIONS = {
    prediction.name: prediction
    for prediction in (
        Prediction("epsilon", lambda signal, sigma: (0.0, 1.0), gain=lambda snr: snr),  # Ho et al., arXiv:2006.11239
        Prediction("sample", lambda signal, sigma: (1.0, 0.0), gain=torch.ones_like),
        # v = signal noise - sigma x, for signal^2 + sigma^2 = 1: Salimans & Ho, arXiv:2202.00512
        Prediction("v_prediction", lambda signal, sigma: (-sigma, signal), gain=lambda snr: snr + 1),
        # the velocity of x_t in t, for signal = 1 - sigma: Liu et al., arXiv:2209.03003
        Prediction("flow_prediction", lambda signal, sigma: (-1.0, 1.0), gain=lambda snr: (1 + snr.sqrt()).square()),
        edm_prediction(sigma_data=0.5),
    )
}


def convert(
    prediction: Tensor, x_t: Tensor, signal: Tensor, sigma: Tensor, *, source: Prediction, target: Prediction
) -> Tensor:
    """What a network that predicts `target` would have said, given one that predicts `source`; (B, C, H, W)."""
    if source is target:
        return prediction
    return target.of(*source.split(prediction, x_t, signal, sigma), signal, sigma)
