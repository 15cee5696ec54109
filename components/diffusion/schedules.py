"""Noise schedules of DDPM (variance-preserving) models, read from a diffusers scheduler config.

Time convention of this package: t in [0, 1], t = 0 is data and t = 1 is noise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from components.errors import BaseModelError

MAX_BETA = 0.999  # of squaredcos_cap_v2, Nichol & Dhariwal 2021, arXiv:2102.09672


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """x_t = sqrt(alphas_cumprod[i]) x + sqrt(1 - alphas_cumprod[i]) noise, where i is the model's integer timestep."""

    alphas_cumprod: Tensor  # (T,) float64, falls from about 1 (data) to about 0 (noise)

    def index(self, t: Tensor) -> Tensor:
        """The integer timestep of t in [0, 1]: floor(t T), at most T - 1. (B,) -> (B,) int64."""
        count = len(self.alphas_cumprod)
        return (t * count).long().clamp(0, count - 1)

    def snr(self, index: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at integer timesteps. (B,) int64 -> (B,) float64."""
        signal = self.alphas_cumprod[index]
        return signal / (1 - signal)


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that a diffusers scheduler config describes.

    Raises: BaseModelError for a beta schedule other than linear, scaled_linear and squaredcos_cap_v2.
    """
    count = int(config.get("num_train_timesteps", 1000))
    if trained := config.get("trained_betas"):
        betas = torch.tensor(trained, dtype=torch.float64)
    else:
        betas = _betas(config, count)
    if config.get("rescale_betas_zero_snr"):
        return NoiseSchedule(_rescaled_to_zero_snr((1 - betas).cumprod(0)))
    return NoiseSchedule((1 - betas).cumprod(0))


def _betas(config: Mapping[str, Any], count: int) -> Tensor:
    name = config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if name == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if name == "scaled_linear":  # of latent diffusion
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if name == "squaredcos_cap_v2":
        bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return torch.tensor([min(1 - after / before, MAX_BETA) for before, after in pairwise(bar)],
                            dtype=torch.float64)  # fmt: skip
    raise BaseModelError(f"beta_schedule is {name!r}, expected linear, scaled_linear or squaredcos_cap_v2")


def _rescaled_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that the last is 0 and the first stays. Lin et al., arXiv:2305.08891."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
