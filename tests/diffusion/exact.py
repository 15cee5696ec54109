"""Data whose every noised density is known: the exact predictions of a perfect model, and where its ODE ends.

All in float64; a batch of points is (N, D). The path is x_t = signal x + sigma noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from components.diffusion.objectives import path_from_scheduler, prediction_from_scheduler
from components.diffusion.predictions import Prediction
from components.diffusion.schedules import EDMPath, NoiseSchedule


class Data(Protocol):
    def denoised(self, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor: ...  # E[x | x_t]
    def transported(self, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor: ...  # the probability flow, to t = 0


@dataclass(frozen=True)
class Gaussian:
    """N(mean, axes diag(std^2) axes^T) in D dimensions; `axes` is orthogonal."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    axes: Tensor  # (D, D)

    def denoised(self, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        gain = signal * self.std**2 / (signal**2 * self.std**2 + sigma**2)
        return self.mean + (gain * ((x_t - signal * self.mean) @ self.axes)) @ self.axes.mT

    def transported(self, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        gain = self.std / (signal**2 * self.std**2 + sigma**2).sqrt()
        return self.mean + (gain * ((x_t - signal * self.mean) @ self.axes)) @ self.axes.mT

    @property
    def covariance(self) -> Tensor:
        return self.axes @ torch.diag(self.std**2) @ self.axes.mT

    def noised(self, normal: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """Points of the density at (signal, sigma), from standard normal ones (N, D)."""
        return signal * self.mean + ((signal**2 * self.std**2 + sigma**2).sqrt() * normal) @ self.axes.mT


@dataclass(frozen=True)
class Mixture:
    """Gaussians on the line, (N, 1): there the probability flow keeps every point's quantile."""

    weights: Tensor  # (K,)
    means: Tensor  # (K,)
    stds: Tensor  # (K,)

    def denoised(self, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        variance = signal**2 * self.stds**2 + sigma**2  # (K,)
        logits = self.weights.log() - 0.5 * variance.log() - (x_t - signal * self.means) ** 2 / (2 * variance)
        each = self.means + signal * self.stds**2 / variance * (x_t - signal * self.means)  # (N, K)
        return (logits.softmax(1) * each).sum(1, keepdim=True)

    def quantile(self, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        std = (signal**2 * self.stds**2 + sigma**2).sqrt()
        return (self.weights * torch.special.ndtr((x_t - signal * self.means) / std)).sum(1, keepdim=True)

    def transported(self, x_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        one, zero = torch.tensor(1.0).double(), torch.tensor(0.0).double()
        goal, low, high = self.quantile(x_t, signal, sigma), torch.full_like(x_t, -50), torch.full_like(x_t, 50)
        for _ in range(60):  # bisection
            middle = (low + high) / 2
            below = self.quantile(middle, one, zero) < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def level(config: dict[str, Any], timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(signal, sigma) of what the model sees at a sampler's timestep; between integers sigma / signal is linear."""
    path, timestep = path_from_scheduler(config), timestep.double()
    if isinstance(path, EDMPath):
        s = (4 * timestep).exp()
    elif isinstance(path, NoiseSchedule):
        s_of = ((1 - path.alphas_cumprod) / path.alphas_cumprod).sqrt()
        low = timestep.floor().long().clamp(0, len(s_of) - 2)
        s = s_of[low] + (timestep - low) * (s_of[low + 1] - s_of[low])
    else:
        return 1 - timestep / path.num_train_timesteps, timestep / path.num_train_timesteps
    signal = (s**2 + (path.sigma_data**2 if isinstance(path, EDMPath) else 1)).rsqrt()
    return signal, s * signal


def perfect_model(config: dict[str, Any], data: Data) -> Callable[[Tensor, Tensor], Tensor]:
    """Predicts what the base of this scheduler config does: the mean of it over all data that could look like x_t."""
    prediction: Prediction = prediction_from_scheduler(config)

    def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
        signal, sigma = level(config, timestep)
        x = data.denoised(x_t, signal, sigma)
        return prediction.of(x, (x_t - signal * x) / sigma, signal, sigma)

    return predict


def run(scheduler: Any, predict: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, *, seed: int = 0) -> Tensor:
    """The sampler's loop as pipelines write it, from what the model sees first, (N, D), to the end."""
    generator = torch.Generator().manual_seed(seed)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x = x_t / scale(torch.ones_like(x_t), scheduler.timesteps[0])
    scheduler._step_index = None  # the question above may have counted as a step
    stochastic = "generator" in scheduler.step.__code__.co_varnames
    for timestep in scheduler.timesteps:
        output = predict(scale(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **({"generator": generator} if stochastic else {})).prev_sample
    return x.double()
