"""Paths from data to noise: how much signal and how much noise there is at a time.

Time convention of this package: t in [0, 1], t = 0 is data, t = 1 is noise, and x_t = signal(t) x + sigma(t) noise is
what the network sees. A path is any object with `point(t)`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from components.errors import BaseModelError

MAX_BETA = 0.999  # of squaredcos_cap_v2, Nichol & Dhariwal 2021, arXiv:2102.09672


@dataclass(frozen=True, slots=True)
class PathPoint:
    """Where t lies on the path: x_t = signal x + sigma noise, and what the model is told about it; all (B,)."""

    signal: Tensor
    sigma: Tensor
    timestep: Tensor

    @property
    def snr(self) -> Tensor:
        return (self.signal / self.sigma).square()


class Path(Protocol):
    def point(self, t: Tensor, /) -> PathPoint:
        """The point of the path at t, (B,) in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """DDPM's variance-preserving path: t in [i / T, (i + 1) / T) is the model's integer timestep i.

    x_t = sqrt(alphas_cumprod[i]) x + sqrt(1 - alphas_cumprod[i]) noise. Source: Ho et al. 2020, arXiv:2006.11239.
    """

    alphas_cumprod: Tensor  # (T,) float64, falls from about 1 (data) to about 0 (noise)

    def index(self, t: Tensor) -> Tensor:
        """The integer timestep of t in [0, 1]: floor(t T), at most T - 1. (B,) -> (B,) int64."""
        count = len(self.alphas_cumprod)
        return (t * count).long().clamp(0, count - 1)

    def point(self, t: Tensor) -> PathPoint:
        index = self.index(t)
        alpha_cumprod = self.alphas_cumprod[index]
        return PathPoint(alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt(), index)

    def snr(self, index: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at integer timesteps. (B,) int64 -> (B,) float64."""
        signal = self.alphas_cumprod[index]
        return signal / (1 - signal)


@dataclass(frozen=True, slots=True)
class StraightPath:
    """Rectified flow: x_t = (1 - t) x + t noise. Liu et al. 2022, arXiv:2209.03003.

    Its timestep is num_train_timesteps * t, a float; samplers that use flow sigmas round it down.
    """

    num_train_timesteps: int = 1000

    def point(self, t: Tensor) -> PathPoint:
        return PathPoint(1 - t, t, (t * self.num_train_timesteps).float())


@dataclass(frozen=True, slots=True)
class VariancePreservingSDE:
    """dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw with beta rising in a line: the limit of DDPM's linear schedule.

    The timestep is 999 t. Source: Song et al. 2021, arXiv:2011.13456, appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def point(self, t: Tensor) -> PathPoint:
        integral = self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2
        return PathPoint((-integral / 2).exp(), (-torch.expm1(-integral)).sqrt(), 999 * t)


@dataclass(frozen=True, slots=True)
class VarianceExplodingSDE:
    """x_t = x + sigma noise with sigma rising geometrically from `sigma_min` to `sigma_max`; the timestep is sigma.

    Source: Song et al. 2021, arXiv:2011.13456, appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def point(self, t: Tensor) -> PathPoint:
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        return PathPoint(torch.ones_like(sigma), sigma, sigma)


@dataclass(frozen=True, slots=True)
class EDMPath:
    """Karras et al. 2022, arXiv:2206.00364: noise of standard deviation s on the data, scaled by c_in to variance 1.

    signal = c_in = 1 / sqrt(s^2 + sigma_data^2), sigma = s c_in, and the timestep is c_noise = ln(s) / 4. Time is
    s = t / (1 - t), clamped to [sigma_min, sigma_max], so that logit-normal times with mean -1.2 and deviation 1.2 are
    the log-normal s that the paper trains with.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def point(self, t: Tensor) -> PathPoint:
        s = (t / (1 - t)).clamp(self.sigma_min, self.sigma_max)
        c_in = (s.square() + self.sigma_data**2).rsqrt()
        return PathPoint(c_in, s * c_in, s.log() / 4)


def karras_sigmas(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """(num_steps,) float64 noise levels for sampling, from `sigma_max` down to `sigma_min`, evenly spaced in s^(1/rho).

    Source: Karras et al. 2022, arXiv:2206.00364, equation 5.
    """
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that a diffusers scheduler config describes.

    Raises: BaseModelError for a beta schedule other than linear, scaled_linear and squaredcos_cap_v2.
    """
    count = int(config.get("num_train_timesteps", 1000))
    if trained := config.get("trained_betas"):
        betas = torch.tensor(trained, dtype=torch.float64)
    else:
        name = config.get("beta_schedule", "linear")
        if name not in BETAS:
            *others, last = BETAS
            raise BaseModelError(f"beta_schedule is {name!r}, expected {', '.join(others)} or {last}")
        betas = BETAS[name](config.get("beta_start", 1e-4), config.get("beta_end", 0.02), count)
    if config.get("rescale_betas_zero_snr"):
        return NoiseSchedule(_rescaled_to_zero_snr((1 - betas).cumprod(0)))
    return NoiseSchedule((1 - betas).cumprod(0))


def linear(start: float, end: float, count: int) -> Tensor:
    """Betas (count,) of Ho et al. 2020, arXiv:2006.11239."""
    return torch.linspace(start, end, count, dtype=torch.float64)


def scaled_linear(start: float, end: float, count: int) -> Tensor:
    """Betas (count,) whose roots rise in a line, of latent diffusion: Rombach et al. 2022, arXiv:2112.10752."""
    return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2


def cosine(start: float, end: float, count: int) -> Tensor:
    """Betas (count,) that make alphas_cumprod a squared cosine: Nichol & Dhariwal 2021, arXiv:2102.09672."""
    bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return torch.tensor([min(1 - after / before, MAX_BETA) for before, after in pairwise(bar)], dtype=torch.float64)


BETAS = {"linear": linear, "scaled_linear": scaled_linear, "squaredcos_cap_v2": cosine}  # by diffusers' names


def _rescaled_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that the last is 0 and the first stays. Lin et al., arXiv:2305.08891."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
