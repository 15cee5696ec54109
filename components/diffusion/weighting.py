"""Loss weights as functions of the signal-to-noise ratio, whatever the network predicts.

A weight is published for the loss of one prediction. Errors of x, noise, v and velocity at the same x_t differ only by
a factor, so the same weight for another prediction is one multiplication: by the gain of the first, over that of the
second (`Prediction.gain`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from components.config import TrainingConfig
from components.diffusion.predictions import PREDICTIONS, Prediction

Weight = Callable[[Tensor], Tensor]  # (B,) SNR -> (B,)
VARIANCE_PRESERVING = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, slots=True)
class Weighting:
    """A weight for the loss of the prediction `native` (None: of whatever is predicted).

    `suits` names the predictions whose networks may be trained with it, `key` the recipe's key that asks for it.
    """

    name: str
    weight: Weight
    native: str | None
    suits: tuple[str, ...] = tuple(PREDICTIONS)
    key: str = "loss_weighting"

    def of(self, prediction: Prediction) -> Weight:
        """The same weight for the loss of `prediction`."""
        if self.native in (None, prediction.name):
            return self.weight
        native = PREDICTIONS[self.native]

        def converted(snr: Tensor) -> Tensor:
            return self.weight(snr) * native.gain(snr) / prediction.gain(snr).clamp_min(torch.finfo(snr.dtype).tiny)

        return converted


def none(snr: Tensor) -> Tensor:
    """Weight 1 everywhere."""
    return torch.ones_like(snr)


def min_snr(gamma: float) -> Weight:
    """Of the loss on x: min(SNR, gamma). Raises: ValueError if gamma <= 0.

    Source: Hang et al. 2023, arXiv:2303.09556.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}, expected a positive number")
    return lambda snr: snr.clamp(max=gamma)


def p2(k: float, gamma: float) -> Weight:
    """Of the loss on noise: 1 / (k + SNR)^gamma, less weight where only details are missing.

    Raises: ValueError if k <= 0 or gamma < 0.    Source: Choi et al. 2022, arXiv:2204.00227, equation 8.
    """
    if k <= 0 or gamma < 0:
        raise ValueError(f"k is {k} and gamma {gamma}, expected a positive k and a gamma of at least 0")
    return lambda snr: (k + snr) ** -gamma


def debiased(snr: Tensor) -> Tensor:
    """Of the loss on noise: 1 / sqrt(SNR). Source: Yu et al. 2023, arXiv:2310.08442."""
    return snr.clamp_min(torch.finfo(snr.dtype).tiny).rsqrt()  # a zero-terminal-SNR schedule has SNR 0


def sigma_sqrt(snr: Tensor) -> Tensor:
    """Of the loss on velocity: sigma^-2, where sigma = t = 1 / (1 + sqrt(SNR)) on the straight path.

    Source: Esser et al. 2024, arXiv:2403.03206, with the name that diffusers gave it.
    """
    return (1 + snr.sqrt()).square()


def cosmap(snr: Tensor) -> Tensor:
    """Of the loss on velocity: 2 / (pi - 2 pi t + 2 pi t^2): what cosmap times do, with uniform times.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    t = 1 / (1 + snr.sqrt())
    return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


UNWEIGHTED = Weighting("none", none, None)
WEIGHTINGS: dict[str, Callable[[TrainingConfig], Weighting]] = {  # training.loss_weighting -> the weighting
    "none": lambda training: UNWEIGHTED,
    "min_snr": lambda training: Weighting(
        "min_snr", min_snr(training.snr_gamma or 0), "sample", VARIANCE_PRESERVING, "snr_gamma"
    ),
    "p2": lambda training: Weighting("p2", p2(training.p2_k, training.p2_gamma), "epsilon", VARIANCE_PRESERVING),
    "debiased": lambda training: Weighting("debiased", debiased, "epsilon", VARIANCE_PRESERVING),
    "sigma_sqrt": lambda training: Weighting("sigma_sqrt", sigma_sqrt, "flow_prediction", ("flow_prediction",)),
    "cosmap": lambda training: Weighting("cosmap", cosmap, "flow_prediction", ("flow_prediction",)),
    # EDM's lambda(s) is chosen so that the loss on its network's own output has weight 1: arXiv:2206.00364, table 1
    "edm": lambda training: Weighting("edm", none, "edm"),
}


def weighting_of(training: TrainingConfig) -> Weighting:
    """The recipe's weighting; `snr_gamma` alone asks for Min-SNR."""
    return WEIGHTINGS["min_snr" if training.snr_gamma is not None else training.loss_weighting](training)
