import json

import pytest
import torch

from components.diffusion.samplers import sampler_from_scheduler
from components.errors import BadInput
from components.families.bases import EMBEDDED
from components.training.formulations import FORMULATIONS, require_objective
from components.training.pretraining_config import PretrainConfig


@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_exact_model_has_no_loss_and_the_shipped_scheduler_undoes_the_noise(name: str):
    """One picture, known by heart: the objective's own answer is right everywhere, and sampling leads back to it."""
    formulation, x = FORMULATIONS[name], torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    objective = formulation.objective(PretrainConfig())
    t = torch.tensor([0.1, 0.5, 0.9])
    noise = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    point = objective.point(t)
    signal, sigma = (c.float().view(-1, 1, 1, 1) for c in (point.signal, point.sigma))
    exact = objective.prediction.of(x, noise, signal, sigma)
    loss = objective.at(lambda *_: exact, x.expand(3, -1, -1, -1), None, t, noise)
    assert loss.max() < 1e-10

    scheduler = sampler_from_scheduler("auto", formulation.scheduler)
    scheduler.set_timesteps(25)
    x_t = noise[:1] * scheduler.init_noise_sigma
    times = torch.linspace(1e-4, 1 - 1e-4, 200_001, dtype=torch.float64)
    grid = objective.point(times)
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x_t, timestep)
        near = (grid.timestep.double() - timestep.double()).abs().argmin()
        signal, sigma = grid.signal[near].float(), grid.sigma[near].float()
        prediction = objective.prediction.of(x, (seen - signal * x) / sigma, signal, sigma)
        x_t = scheduler.step(prediction, timestep, x_t).prev_sample
    assert (x_t - x).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("name", FORMULATIONS)
def test_a_pipeline_goes_on_only_with_the_objective_it_was_trained_for(name: str, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(FORMULATIONS[name].scheduler))
    require_objective(tmp_path, PretrainConfig(objective=name))
    for other in FORMULATIONS.keys() - {name}:
        with pytest.raises(BadInput, match=f"objective '{other}' asks for"):
            require_objective(tmp_path, PretrainConfig(objective=other))


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(BadInput, match="expected the folder of a diffusers pipeline"):
        require_objective(tmp_path, PretrainConfig())


def test_the_embedded_base_is_the_default_formulation():
    require_objective(EMBEDDED, PretrainConfig())
    shipped = json.loads((EMBEDDED / "scheduler/scheduler_config.json").read_text())
    assert {key: shipped[key] for key in FORMULATIONS["flow"].scheduler} == FORMULATIONS["flow"].scheduler
