"""Densities of training times: functions of uniform numbers in (0, 1), t = 0 is data, t = 1 is noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from components.config import TrainingConfig

Density = Callable[[Tensor], Tensor]  # uniform (B,) in (0, 1) -> t (B,) in (0, 1), rising
Shift = Callable[[Sequence[int]], float]  # shape (B, C, H, W) of the latents -> factor


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


MAX_MODE_SCALE = 2 / (math.pi - 2)  # above it, times of the mode density would not rise with u


def mode(u: Tensor, *, scale: float = 1.29) -> Tensor:
    """Times with a heavy tail: t = 1 - f(u), f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u).

    The density is symmetric about 1/2; a positive `scale` favours the middle, a negative one the ends, 0 is uniform.
    u: (B,) uniform in (0, 1). Returns (B,) in (0, 1), rising with u.
    Raises: ValueError if scale is outside [-1, 2 / (pi - 2)].
    Source: Esser et al. 2024, arXiv:2403.03206, equation 20.
    """
    if not -1 <= scale <= MAX_MODE_SCALE:
        raise ValueError(f"scale is {scale}, expected a number from -1 to {MAX_MODE_SCALE:.4f}")
    return u + scale * (u - torch.sin(math.pi * u / 2).square())


def cosmap(u: Tensor) -> Tensor:
    """t = 1 - 1 / (tan(pi u / 2) + 1): the straight path then has the log-SNR density of the cosine schedule.

    u: (B,) uniform in (0, 1). Returns (B,) in (0, 1).    Source: Esser et al. 2024, arXiv:2403.03206, equation 21.
    """
    tan = torch.tan(math.pi * u / 2)
    return tan / (tan + 1)


DENSITIES: dict[str, Callable[[TrainingConfig], Density]] = {  # training.timestep_sampling -> the density
    "uniform": lambda training: uniform,
    "logit_normal": lambda training: partial(logit_normal, mean=training.logit_mean, std=training.logit_std),
    "mode": lambda training: partial(mode, scale=training.mode_scale),
    "cosmap": lambda training: cosmap,
}


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t): the odds t / (1 - t) times `shift`, so above 1 towards noise. (B,) -> (B,).

    Resolution with shift^2 times the pixels is as noisy at the shifted time as the old one was at t.
    Source: Esser et al. 2024, arXiv:2403.03206, equation 23.
    """
    return shift * t / (1 + (shift - 1) * t)


def constant_shift(shape: Sequence[int], *, shift: float = 1.0) -> float:
    """The same shift whatever the resolution; 1 changes nothing."""
    return shift


def dynamic_shift(
    shape: Sequence[int],
    *,
    patch: int = 2,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    time_shift_type: str = "exponential",
) -> float:
    """FLUX.1's shift: mu grows with the tokens in a line through two points, and the shift is exp(mu).

    `shape` (B, C, H, W) of the latents, of which patch x patch are a token; names and defaults are those of diffusers'
    FlowMatchEulerDiscreteScheduler. `time_shift_type` "linear" takes mu itself for the shift.
    Raises: ValueError for another type.
    """
    if time_shift_type not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type is {time_shift_type!r}, expected exponential or linear")
    tokens = (shape[-2] // patch) * (shape[-1] // patch)
    slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
    mu = base_shift + slope * (tokens - base_image_seq_len)
    return math.exp(mu) if time_shift_type == "exponential" else mu


def shift_of(training: TrainingConfig, config: Mapping[str, Any], patch: int = 2) -> Shift:
    """The recipe's shift; a dynamic one takes its numbers from the base's diffusers scheduler config."""
    if not training.use_dynamic_shifting:
        shift = training.discrete_flow_shift
        return constant_shift if shift == 1 else partial(constant_shift, shift=shift)
    keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
    return partial(dynamic_shift, patch=patch, **{key: config[key] for key in keys if config.get(key) is not None})


def stratified(u: Tensor) -> Tensor:
    """One uniform time in each of B equal strata, in order: (i + u_i) / B. u: (B,) in (0, 1). Returns (B,) in (0, 1).

    The result depends on the batch as a whole; a training that wants it draws stratified numbers (`Draws.stratified`).
    """
    return (torch.arange(len(u), dtype=u.dtype) + u) / len(u)
