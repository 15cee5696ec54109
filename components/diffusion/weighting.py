"""Loss weights as functions of the signal-to-noise ratio."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Weight = Callable[[Tensor], Tensor]  # (B,) SNR -> (B,)


def none(snr: Tensor) -> Tensor:
    """Weight 1 everywhere."""
    return torch.ones_like(snr)


def min_snr(gamma: float, prediction_type: str) -> Weight:
    """Min-SNR-gamma: the loss on x0 gets weight min(SNR, gamma), written for what the model predicts.

    `prediction_type` is epsilon, v_prediction or sample. Raises: ValueError for another one, or if gamma <= 0.
    Source: Hang et al. 2023, arXiv:2303.09556.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}, expected a positive number")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"Min-SNR weighting is for epsilon, v_prediction and sample, not {prediction_type!r}")
    return partial(_min_snr, gamma=gamma, prediction_type=prediction_type)


def _min_snr(snr: Tensor, *, gamma: float, prediction_type: str) -> Tensor:
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return capped / snr.clamp_min(torch.finfo(snr.dtype).tiny)
    return capped / (snr + 1) if prediction_type == "v_prediction" else capped
