"""Samplers by name: diffusers' own scheduler classes, built from the config of a base's scheduler.

A name is a method on a kind of path; a base on another kind of path is refused, since diffusers would take its numbers
for those of another model and draw noise.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from components.diffusion.objectives import path_from_scheduler, prediction_from_scheduler
from components.diffusion.schedules import EDMPath, NoiseSchedule, StraightPath
from components.errors import BaseModelError

PATH_NAMES = {NoiseSchedule: "DDPM", StraightPath: "rectified-flow", EDMPath: "EDM"}


@dataclass(frozen=True, slots=True)
class Sampler:
    """A diffusers class for each kind of path that the method works on, and its changes to the base's config.

    `unable` names the predictions that the class has not learnt to read.
    """

    classes: Mapping[type, str]
    changes: Mapping[str, Any] = field(default_factory=dict)
    unable: tuple[str, ...] = ()


def _ddpm(name: str) -> dict[type, str]:
    return {NoiseSchedule: name}


def _multistep(name: str) -> dict[type, str]:
    return {NoiseSchedule: name, StraightPath: name}


DPM, EDM_DPM = "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"
SAMPLERS = {
    # ancestral: every step adds fresh noise. Ho et al. 2020, arXiv:2006.11239
    "ddpm": Sampler(_ddpm("DDPMScheduler")),
    # first order in the log-SNR. Song et al. 2021, arXiv:2010.02502; inversion runs it from data to noise
    "ddim": Sampler(_ddpm("DDIMScheduler")),
    "ddim_inverse": Sampler(_ddpm("DDIMInverseScheduler")),
    # the probability-flow ODE in sigma. Karras et al. 2022, arXiv:2206.00364, algorithm 1; Euler is its first half.
    # On a straight path the multistep solver's first order is Euler's method in t, in a class that every pipeline runs
    "euler": Sampler(
        {NoiseSchedule: "EulerDiscreteScheduler", EDMPath: "EDMEulerScheduler", StraightPath: DPM},
        {"algorithm_type": "dpmsolver++", "solver_order": 1},
    ),
    "euler_ancestral": Sampler(_ddpm("EulerAncestralDiscreteScheduler"), unable=("sample",)),
    "heun": Sampler(_ddpm("HeunDiscreteScheduler")),
    # second-order multistep on the data prediction, and its SDE. Lu et al. 2022, arXiv:2211.01095
    "dpmsolver++": Sampler(_multistep(DPM) | {EDMPath: EDM_DPM}, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "sde-dpmsolver++": Sampler(
        _multistep(DPM) | {EDMPath: EDM_DPM}, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    ),
    # predictor-corrector. Zhao et al. 2023, arXiv:2302.04867
    "unipc": Sampler(_multistep("UniPCMultistepScheduler")),
    # the flow's own ODE in t. Liu et al. 2022, arXiv:2209.03003
    "flow_euler": Sampler({StraightPath: "FlowMatchEulerDiscreteScheduler"}),
    "flow_heun": Sampler({StraightPath: "FlowMatchHeunDiscreteScheduler"}),
}


def sampler_from_scheduler(name: str, config: Mapping[str, Any], *, unfit: Collection[str] = ()) -> Any:
    """The diffusers scheduler of sampler `name` for a base with this scheduler config; "auto" is the base's own.

    `unfit` names samplers that the base's pipeline cannot run. Raises: BaseModelError for one of these, an unknown
    name, or when the sampler is not for the base's path or prediction.
    """
    import diffusers

    if name == "auto":
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if name not in SAMPLERS:
        raise BaseModelError(f"sampler is {name!r}, expected auto, {', '.join(SAMPLERS)}")
    sampler, path = SAMPLERS[name], type(path_from_scheduler(config))
    prediction = prediction_from_scheduler(config).name
    suited = [n for n, entry in SAMPLERS.items() if path in entry.classes and prediction not in entry.unable]
    if name not in suited or name in unfit:
        why = (
            "the base model's stock pipeline cannot run it"
            if name in suited
            else f"the base model predicts {prediction!r} on a {PATH_NAMES[path]} path"
        )
        expected = ", ".join(["auto", *(other for other in suited if other not in unfit)])
        raise BaseModelError(f"sampler is {name!r}, but {why}, expected {expected}")
    scheduler: Any = getattr(diffusers, sampler.classes[path])
    settings = {**_said_in_every_way(config, path, prediction), **sampler.changes}
    taken = inspect.signature(scheduler).parameters
    return scheduler.from_config({key: value for key, value in settings.items() if key in taken})


def _said_in_every_way(config: Mapping[str, Any], path: type, prediction: str) -> dict[str, Any]:
    """The config with what one scheduler class leaves unsaid or calls otherwise and another one reads."""
    if path is not StraightPath:
        return {"clip_sample": False, **config}  # DDIM and DDPM clip x to [-1, 1] unless told, which ruins latents
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return {**config, "prediction_type": prediction, "use_flow_sigmas": True, "shift": shift, "flow_shift": shift}
