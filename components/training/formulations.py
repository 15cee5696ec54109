"""What a base is pre-trained to do, by name: the scheduler that ships with it says path and prediction, here are times.

All latents have unit variance (`fold_latent_statistics`), which EDM calls sigma_data = 1.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.diffusion.objectives import (
    Objective,
    objective_from_scheduler,
    path_from_scheduler,
    prediction_from_scheduler,
)
from components.diffusion.samplers import PATH_NAMES
from components.diffusion.timesteps import Density, logit_normal, uniform
from components.errors import BadInput
from components.training.pretraining_config import PretrainConfig

STEPS = {"num_train_timesteps": 1000, "steps_offset": 1}  # the stock pipeline insists on the offset


@dataclass(frozen=True, slots=True)
class Formulation:
    """A diffusers scheduler config with its class, and the density of training times."""

    scheduler: Mapping[str, Any]
    to_time: Callable[[PretrainConfig], Density] = lambda config: uniform

    def objective(self, config: PretrainConfig) -> Objective:
        return objective_from_scheduler(self.scheduler, to_time=self.to_time(config))


FORMULATIONS = {
    # Ho et al. 2020, arXiv:2006.11239, with the schedule of latent diffusion, arXiv:2112.10752
    "ddpm": Formulation(
        STEPS
        | {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "prediction_type": "epsilon",
        }
    ),
    # Salimans & Ho 2022, arXiv:2202.00512, on a cosine schedule that ends in pure noise: arXiv:2305.08891
    "v": Formulation(
        STEPS
        | {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    ),
    # Karras et al. 2022, arXiv:2206.00364: log-normal sigma, its mean moved from sigma_data = 0.5 to 1 by ln 2
    "edm": Formulation(
        {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "epsilon"},
        lambda config: partial(logit_normal, mean=-0.5, std=1.2),
    ),
    # Liu et al. 2022, arXiv:2209.03003
    "flow": Formulation(
        STEPS
        | {
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "final_sigmas_type": "zero",
        },
        lambda config: partial(logit_normal, mean=config.time_mean),
    ),
}


def require_objective(pipeline: Path, config: PretrainConfig) -> None:
    """Raises: BadInput when a pipeline folder was trained for something else than `config.objective`."""
    file = pipeline / "scheduler" / "scheduler_config.json"
    try:
        found = _kind(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: {error}; expected the folder of a diffusers pipeline") from None
    if found != (asked := _kind(FORMULATIONS[config.objective].scheduler)):
        raise BadInput(
            f"{pipeline}: predicts {found[0]!r} on a {found[1]} path, objective {config.objective!r} asks for "
            f"{asked[0]!r} on a {asked[1]} path; leave out --start and train from scratch, or choose its objective"
        )


def _kind(scheduler: Mapping[str, Any]) -> tuple[str, str]:
    return prediction_from_scheduler(scheduler).name, PATH_NAMES[type(path_from_scheduler(scheduler))]
