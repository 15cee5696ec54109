"""What a denoiser is trained to do: predict something about a point of a path, at drawn times, with weighted errors.

Time convention, the only one in this package: t in [0, 1], t = 0 is data, t = 1 is noise, and
x_t = signal(t) x + sigma(t) noise. The model is handed the timestep that the stock diffusers pipeline passes at that
point: 0 to 999 on a usual schedule, growing with t.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from components.diffusion.noise import Drawing, Noising, white
from components.diffusion.predictions import PREDICTIONS, Prediction, edm_prediction
from components.diffusion.schedules import EDMPath, NoiseSchedule, Path, PathPoint, StraightPath, noise_schedule
from components.diffusion.timesteps import Density, Shift, constant_shift, shifted, uniform
from components.diffusion.weighting import UNWEIGHTED, Weight, Weighting, none
from components.errors import BaseModelError

STRAIGHT = StraightPath()


class Denoiser(Protocol):
    def __call__(self, x_t: Tensor, timestep: Tensor, prompt_embeds: Any, /) -> Tensor:
        """(B, C, H, W), (B,), what the family conditions on -> the prediction, (B, C, H, W)."""
        ...


class LatentBatch(Protocol):
    @property
    def latents(self) -> Tensor: ...  # (B, C, H, W)
    @property
    def prompt_embeds(self) -> Tensor: ...  # (B, L, D)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Mean squared error of a prediction on a path; times, weight and noise are functions that it is given."""

    prediction: Prediction
    path: Path
    to_time: Density = uniform
    shift: Shift = constant_shift  # of the times, by the shape of the latents
    weight: Weight = none  # of the loss, as a function of the signal-to-noise ratio
    noise: Noising = white  # what the white noise becomes, in the target and in what the model sees
    input_noise: Noising = white  # what that becomes in what the model sees alone

    def point(self, t: Tensor) -> PathPoint:
        """The point of the path at t, (B,) in [0, 1]."""
        return self.path.point(t)

    def at(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        prompt_embeds: Any,
        t: Tensor,
        noise: Tensor,
        seen_noise: Tensor | None = None,
        cells: Tensor | None = None,
    ) -> Tensor:
        """Weighted error per sample, (B,), at given times (B,) and noise (B, C, H, W); the model sees `seen_noise`.

        `cells` (B, 1, H, W) are factors on the squared error of each cell, whose mean stays over all of them.
        """
        point = self.point(t)
        signal, sigma = (c.to(latents).view(-1, 1, 1, 1) for c in (point.signal, point.sigma))
        x_t = signal * latents + sigma * (noise if seen_noise is None else seen_noise)
        prediction = denoiser(x_t, point.timestep.to(latents.device), prompt_embeds)
        squares = (prediction - self.prediction.of(latents, noise, signal, sigma)).square()
        error = (squares if cells is None else squares * cells).mean(dim=(1, 2, 3))
        return self.weight(point.snr).to(error) * error

    def per_sample(
        self, denoiser: Denoiser, latents: Tensor, prompt_embeds: Any, draw: Drawing, cells: Tensor | None = None
    ) -> Tensor:
        """Weighted error per sample, (B,), at the times and with the noise that `draw` gives each sample."""
        noise = self.noise(draw.normal(latents.shape), draw)
        seen = self.input_noise(noise, draw)
        t = shifted(self.to_time(draw.uniform(len(latents))), self.shift(latents.shape))
        seen_noise = None if seen is noise else seen.to(latents)
        return self.at(denoiser, latents, prompt_embeds, t, noise.to(latents), seen_noise, cells)

    def __call__(self, denoiser: Denoiser, batch: LatentBatch, draw: Drawing) -> Tensor:
        """The training loss: the mean of `per_sample`, a scalar."""
        return self.per_sample(denoiser, batch.latents, batch.prompt_embeds, draw).mean()


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Objective):
    """The model predicts the velocity noise - x on the straight path x_t = (1 - t) x + t noise."""

    prediction: Prediction = PREDICTIONS["flow_prediction"]
    path: Path = STRAIGHT


def objective_from_scheduler(
    config: Mapping[str, Any],
    *,
    prediction_type: str = "auto",
    to_time: Density = uniform,
    shift: Shift = constant_shift,
    weighting: Weighting = UNWEIGHTED,
    noise: Noising = white,
    input_noise: Noising = white,
) -> Objective:
    """The objective that a base model was trained with, according to its diffusers scheduler config.

    `prediction_type` other than "auto" is what the recipe expects. Raises: BaseModelError when the config says
    otherwise, contradicts itself or names an unknown type, or when the weighting or a shift does not suit the base.
    """
    prediction, path = prediction_from_scheduler(config), path_from_scheduler(config)
    if prediction_type not in ("auto", prediction.name):
        raise BaseModelError(
            f"the recipe says prediction_type = {prediction_type!r}, but the base model's scheduler says "
            f'{prediction.name!r}; set training.prediction_type = "auto"'
        )
    if prediction.name not in weighting.suits:
        raise BaseModelError(
            f"training.{weighting.key} asks for {weighting.name} weighting, which does not apply to a base model that "
            f"predicts {prediction.name!r}, expected {', '.join(weighting.suits)}; remove it"
        )
    if shift is not constant_shift and not isinstance(path, StraightPath):
        raise BaseModelError(
            "training.discrete_flow_shift and use_dynamic_shifting do not apply to a base model that predicts "
            f"{prediction.name!r}, expected flow_prediction; remove them"
        )
    kind = RectifiedFlow if isinstance(path, StraightPath) else Objective
    return kind(
        prediction=prediction,
        path=path,
        to_time=to_time,
        shift=shift,
        weight=weighting.of(prediction),
        noise=noise,
        input_noise=input_noise,
    )


def path_from_scheduler(config: Mapping[str, Any]) -> NoiseSchedule | StraightPath | EDMPath:
    """The path that a diffusers scheduler config describes. Raises: BaseModelError for one that is not known."""
    name = str(config.get("_class_name", ""))
    if name.startswith("EDM"):
        return EDMPath(**{key: config[key] for key in ("sigma_data", "sigma_min", "sigma_max") if key in config})
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return StraightPath(int(config.get("num_train_timesteps", 1000)))
    if name.startswith("ScoreSde"):
        raise BaseModelError(f"scheduler {name} is for unconditional pixel models, which no family here loads")
    return noise_schedule(config)


def prediction_from_scheduler(config: Mapping[str, Any]) -> Prediction:
    """What the base predicts by its diffusers scheduler config. Raises: BaseModelError when it contradicts itself."""
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch"):
        return PREDICTIONS["flow_prediction"]
    found = config.get("prediction_type") or "epsilon"
    if name.startswith("EDM"):
        return _edm_prediction(name, found, config.get("sigma_data", 0.5))
    if found not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise BaseModelError(f"prediction_type is {found!r}, expected epsilon, v_prediction, sample or flow_prediction")
    if (found == "flow_prediction") != bool(config.get("use_flow_sigmas")):
        raise BaseModelError(
            f"the scheduler config contradicts itself: prediction_type is {found!r}, "
            f"use_flow_sigmas is {bool(config.get('use_flow_sigmas'))}; correct scheduler_config.json"
        )
    return PREDICTIONS[found]


def _edm_prediction(scheduler: str, found: str, sigma_data: float) -> Prediction:
    """diffusers calls EDM's output "epsilon"; its "v_prediction" is the usual v where sigma_data is 1 (CosXL)."""
    if found == "epsilon":
        return edm_prediction(sigma_data)
    if found == "v_prediction" and sigma_data == 1:
        return PREDICTIONS["v_prediction"]
    raise BaseModelError(
        f"scheduler {scheduler} says prediction_type = {found!r} with sigma_data = {sigma_data}, "
        "expected epsilon, or v_prediction with sigma_data = 1"
    )
