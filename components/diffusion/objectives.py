"""What a denoiser is trained to predict: a path from data to noise, a target on it, and a weight.

Time convention, the only one in this package: t in [0, 1], t = 0 is data, t = 1 is noise, and
x_t = signal(t) x + sigma(t) noise. The model is handed the timestep that the stock diffusers pipeline passes at that
point: 0 to 999 on a usual schedule, growing with t.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from components.diffusion.draws import Draw
from components.diffusion.schedules import NoiseSchedule, noise_schedule
from components.diffusion.timesteps import uniform
from components.diffusion.weighting import Weight, min_snr, none
from components.errors import BaseModelError


class Denoiser(Protocol):
    def __call__(self, x_t: Tensor, timestep: Tensor, prompt_embeds: Any, /) -> Tensor:
        """(B, C, H, W), (B,), what the family conditions on -> the prediction, (B, C, H, W)."""
        ...


class LatentBatch(Protocol):
    @property
    def latents(self) -> Tensor: ...  # (B, C, H, W)
    @property
    def prompt_embeds(self) -> Tensor: ...  # (B, L, D)


@dataclass(frozen=True, slots=True)
class PathPoint:
    """Where t lies on the path: x_t = signal x + sigma noise, and what the model is told about it; all (B,)."""

    signal: Tensor
    sigma: Tensor
    timestep: Tensor

    @property
    def snr(self) -> Tensor:
        return (self.signal / self.sigma).square()


@dataclass(frozen=True)
class Objective(ABC):
    """Mean squared error of a prediction on a path; subclasses are the paths and targets."""

    prediction_type: ClassVar[str]
    to_time: Callable[[Tensor], Tensor] = uniform  # uniform (B,) -> t (B,) in (0, 1)
    weight: Weight = none  # of the loss, as a function of the signal-to-noise ratio

    @abstractmethod
    def point(self, t: Tensor) -> PathPoint:
        """The point of the path at t, (B,) in [0, 1]."""

    @abstractmethod
    def target(self, x: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """What the model should predict; (B, C, H, W), with signal and sigma (B, 1, 1, 1)."""

    def at(self, denoiser: Denoiser, latents: Tensor, prompt_embeds: Any, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted error per sample, (B,), at given times (B,) and noise (B, C, H, W)."""
        point = self.point(t)
        signal, sigma = (c.to(latents).view(-1, 1, 1, 1) for c in (point.signal, point.sigma))
        prediction = denoiser(signal * latents + sigma * noise, point.timestep.to(latents.device), prompt_embeds)
        error = (prediction - self.target(latents, noise, signal, sigma)).square().mean(dim=(1, 2, 3))
        return self.weight(point.snr).to(error) * error

    def per_sample(self, denoiser: Denoiser, latents: Tensor, prompt_embeds: Any, draw: Draw) -> Tensor:
        """Weighted error per sample, (B,), at the times and with the noise that `draw` gives each sample."""
        noise = draw.normal(latents.shape).to(latents)
        return self.at(denoiser, latents, prompt_embeds, self.to_time(draw.uniform(len(latents))), noise)

    def __call__(self, denoiser: Denoiser, batch: LatentBatch, draw: Draw) -> Tensor:
        """The training loss: the mean of `per_sample`, a scalar."""
        return self.per_sample(denoiser, batch.latents, batch.prompt_embeds, draw).mean()


@dataclass(frozen=True, kw_only=True)
class DiscretePath(Objective):
    """DDPM's variance-preserving path: t in [i / T, (i + 1) / T) is integer timestep i of the schedule."""

    schedule: NoiseSchedule

    def point(self, t: Tensor) -> PathPoint:
        index = self.schedule.index(t)
        alpha_cumprod = self.schedule.alphas_cumprod[index]
        return PathPoint(alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt(), index)


@dataclass(frozen=True, kw_only=True)
class Epsilon(DiscretePath):
    """The model predicts the noise. Ho et al. 2020, arXiv:2006.11239."""

    prediction_type = "epsilon"

    def target(self, x: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return noise


@dataclass(frozen=True, kw_only=True)
class VPrediction(DiscretePath):
    """The model predicts v = signal noise - sigma x. Salimans & Ho 2022, arXiv:2202.00512."""

    prediction_type = "v_prediction"

    def target(self, x: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return signal * noise - sigma * x


@dataclass(frozen=True, kw_only=True)
class Sample(DiscretePath):
    """The model predicts x, the clean latents."""

    prediction_type = "sample"

    def target(self, x: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Objective):
    """The model predicts the velocity noise - x on the straight path x_t = (1 - t) x + t noise.

    Its timestep is num_train_timesteps * t, a float; samplers that use flow sigmas round it down.
    Source: Liu et al. 2022, arXiv:2209.03003.
    """

    prediction_type = "flow_prediction"
    num_train_timesteps: int = 1000

    def point(self, t: Tensor) -> PathPoint:
        return PathPoint(1 - t, t, (t * self.num_train_timesteps).float())

    def target(self, x: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        return noise - x


def objective_from_scheduler(
    config: Mapping[str, Any],
    *,
    prediction_type: str = "auto",
    to_time: Callable[[Tensor], Tensor] = uniform,
    snr_gamma: float | None = None,
) -> Objective:
    """The objective that a base model was trained with, according to its diffusers scheduler config.

    `prediction_type` other than "auto" is what the recipe expects. Raises: BaseModelError when the config says
    otherwise, contradicts itself or names an unknown type, or when Min-SNR weighting is asked of a flow model.
    """
    found = _prediction_type(config)
    if prediction_type not in ("auto", found):
        raise BaseModelError(
            f"the recipe says prediction_type = {prediction_type!r}, but the base model's scheduler says {found!r}; "
            'set training.prediction_type = "auto"'
        )
    if found == "flow_prediction":
        if snr_gamma is not None:
            raise BaseModelError("training.snr_gamma does not apply to a rectified-flow base model; remove it")
        return RectifiedFlow(to_time=to_time, num_train_timesteps=int(config.get("num_train_timesteps", 1000)))
    kinds = {kind.prediction_type: kind for kind in (Epsilon, VPrediction, Sample)}
    weight = none if snr_gamma is None else min_snr(snr_gamma, found)
    return kinds[found](schedule=noise_schedule(config), to_time=to_time, weight=weight)


def _prediction_type(config: Mapping[str, Any]) -> str:
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch"):
        return "flow_prediction"
    if name.startswith("EDM"):
        raise BaseModelError(f"scheduler {name} uses EDM preconditioning, which is not supported")
    found = config.get("prediction_type") or "epsilon"
    if found not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise BaseModelError(f"prediction_type is {found!r}, expected epsilon, v_prediction, sample or flow_prediction")
    if (found == "flow_prediction") != bool(config.get("use_flow_sigmas")):
        raise BaseModelError(
            f"the scheduler config contradicts itself: prediction_type is {found!r}, "
            f"use_flow_sigmas is {bool(config.get('use_flow_sigmas'))}; correct scheduler_config.json"
        )
    return found
