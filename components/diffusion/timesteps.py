"""Densities of training times: functions of uniform numbers in (0, 1), t = 0 is data, t = 1 is noise."""

import torch
from torch import Tensor


def uniform(u: Tensor) -> Tensor:
    """Every time equally often. u: (B,) in (0, 1). Returns (B,) in (0, 1)."""
    return u


def logit_normal(u: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std * Phi^-1(u)): most effort goes to the middle of the path.

    u: (B,) uniform in (0, 1). Returns (B,) in (0, 1), dimensionless; a positive `mean` moves it towards noise.
    Raises: ValueError if std <= 0.    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    if std <= 0:
        raise ValueError(f"std is {std}, expected a positive number")
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double()))


def stratified(u: Tensor) -> Tensor:
    """One uniform time in each of B equal strata, in order: (i + u_i) / B. u: (B,) in (0, 1). Returns (B,) in (0, 1).

    The result depends on the batch as a whole: for validation, not for training that must resume bit by bit.
    """
    return (torch.arange(len(u), dtype=u.dtype) + u) / len(u)
