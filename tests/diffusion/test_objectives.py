from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from components.config import TrainingConfig
from components.diffusion.draws import Draw, Draws
from components.diffusion.objectives import Objective, RectifiedFlow, objective_from_scheduler
from components.diffusion.predictions import PREDICTIONS, edm_prediction
from components.diffusion.schedules import (
    EDMPath,
    NoiseSchedule,
    StraightPath,
    VarianceExplodingSDE,
    VariancePreservingSDE,
    noise_schedule,
)
from components.diffusion.timesteps import DENSITIES, logit_normal, shift_of
from components.diffusion.weighting import WEIGHTINGS, min_snr, weighting_of
from components.errors import BaseModelError

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULE = noise_schedule(SD15)


def recipe(**settings) -> dict:
    """What a recipe's settings hand to `objective_from_scheduler`."""
    training = TrainingConfig(**settings)
    return {
        "to_time": DENSITIES[training.timestep_sampling](training),
        "shift": shift_of(training, {}),
        "weighting": weighting_of(training),
    }


OBJECTIVES = {
    **{kind: Objective(prediction=PREDICTIONS[kind], path=SCHEDULE) for kind in ("epsilon", "v_prediction", "sample")},
    "flow": RectifiedFlow(),
    "flow, logit-normal, shifted": RectifiedFlow(to_time=logit_normal, shift=lambda shape: 3.0),
    "edm": Objective(prediction=PREDICTIONS["edm"], path=EDMPath()),
    "edm of CosXL": Objective(prediction=PREDICTIONS["v_prediction"], path=EDMPath(sigma_data=1.0)),
    "epsilon on the VP SDE": Objective(prediction=PREDICTIONS["epsilon"], path=VariancePreservingSDE()),
    "sample on the VE SDE": Objective(prediction=PREDICTIONS["sample"], path=VarianceExplodingSDE()),
}


@dataclass(frozen=True)
class Batch:
    sample_ids: tuple[str, ...]
    latents: Tensor
    prompt_embeds: Tensor


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        tuple("abcdef"),
        torch.randn(6, 4, 8, 8, generator=generator),
        torch.randn(6, 3, 5, generator=generator),
    )


@pytest.fixture
def draw(batch: Batch) -> Draw:
    return Draws(0)(0, batch.sample_ids)


def level_of(objective: Objective, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(signal, sigma) from the timestep alone: what a model can know."""
    path, t = objective.path, timestep.double()
    if isinstance(path, NoiseSchedule):
        return path.alphas_cumprod[timestep].sqrt(), (1 - path.alphas_cumprod[timestep]).sqrt()
    if isinstance(path, StraightPath):
        return 1 - t / path.num_train_timesteps, t / path.num_train_timesteps
    if isinstance(path, EDMPath):
        s = (4 * t).exp()
        return (s**2 + path.sigma_data**2).rsqrt(), s * (s**2 + path.sigma_data**2).rsqrt()
    if isinstance(path, VariancePreservingSDE):
        signal = (-0.25 * (t / 999) ** 2 * 19.9 - 0.5 * (t / 999) * 0.1).exp()
        return signal, (1 - signal**2).sqrt()
    return torch.ones_like(t), t


def exact_denoiser(objective: Objective, x: Tensor):
    """Knows the data, so it can tell noise and data apart at the timestep it is given."""

    def denoise(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        signal, sigma = (c.view(-1, 1, 1, 1) for c in level_of(objective, timestep))
        return objective.prediction.of(x, (x_t - signal * x) / sigma, signal, sigma)

    return denoise


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_exact_model_has_zero_loss_and_an_almost_exact_one_has_not(name: str, batch: Batch, draw: Draw):
    objective = OBJECTIVES[name]
    exact = exact_denoiser(objective, batch.latents)
    assert objective(exact, batch, draw) < 1e-6
    assert objective(lambda *seen: exact(*seen) + 0.01, batch, draw) == pytest.approx(1e-4, rel=0.1)


def test_a_plain_objective_has_the_bits_of_the_formula_written_out(batch: Batch, draw: Draw):
    """What a recipe without noise settings trained with before there were any."""
    noise, t = draw.normal(batch.latents.shape), draw.uniform(6)
    s, index = t.float().view(-1, 1, 1, 1), (t * 1000).long()
    alpha_cumprod = SCHEDULE.alphas_cumprod[index]
    signal, sigma = (c.float().view(-1, 1, 1, 1) for c in (alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()))

    def model(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        return torch.tanh(x_t) * (timestep.view(-1, 1, 1, 1) + 1).log().float()

    flow = (model((1 - t).float().view(-1, 1, 1, 1) * batch.latents + s * noise, (t * 1000).float(), noise)
            - (noise - batch.latents)).square().mean(dim=(1, 2, 3))  # fmt: skip
    assert torch.equal(RectifiedFlow().per_sample(model, batch.latents, batch.prompt_embeds, draw), flow)
    seen = model(signal * batch.latents + sigma * noise, index, noise)
    targets = {"epsilon": noise, "sample": batch.latents, "v_prediction": signal * noise - sigma * batch.latents}
    for kind, target in targets.items():
        plain = objective_from_scheduler(SD15 | {"prediction_type": kind})
        expected = (seen - target).square().mean(dim=(1, 2, 3))
        assert torch.equal(plain.per_sample(model, batch.latents, batch.prompt_embeds, draw), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_mean_of_the_losses_per_sample_and_these_ignore_the_neighbours(
    name: str, batch: Batch, draw: Draw
):
    objective = OBJECTIVES[name]

    def wrong(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        return 0.5 * x_t

    losses = objective.per_sample(wrong, batch.latents, batch.prompt_embeds, draw)
    assert losses.shape == (6,)
    torch.testing.assert_close(objective(wrong, batch, draw), losses.mean())
    alone = objective.per_sample(wrong, batch.latents[2:3], batch.prompt_embeds[2:3], Draws(0)(0, ["c"]))
    torch.testing.assert_close(alone, losses[2:3])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_paths_and_targets_agree_with_diffusers(kind: str, batch: Batch):
    scheduler = DDPMScheduler(**SD15)
    noise, t = torch.randn_like(batch.latents), torch.tensor([0.0, 0.1, 0.35, 0.5, 0.9999, 1.0])
    seen = {}

    def spy(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        seen.update(x_t=x_t, timestep=timestep)
        return torch.zeros_like(x_t)

    losses = OBJECTIVES[kind].at(spy, batch.latents, batch.prompt_embeds, t, noise)
    assert seen["timestep"].tolist() == [0, 100, 350, 500, 999, 999]
    torch.testing.assert_close(
        seen["x_t"], scheduler.add_noise(batch.latents, noise, seen["timestep"]), rtol=1e-4, atol=1e-4
    )
    target = {
        "epsilon": noise, "sample": batch.latents,
        "v_prediction": scheduler.get_velocity(batch.latents, noise, seen["timestep"]),
    }[kind]  # fmt: skip
    torch.testing.assert_close(losses, target.square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_times_are_the_sigmas_of_the_stock_sampler_and_timesteps_agree_up_to_its_rounding(scheduler_class: type):
    scheduler = scheduler_class(**FLOW)
    scheduler.set_timesteps(25)
    sigmas = scheduler.sigmas[:-1]
    point = RectifiedFlow().point(sigmas)
    torch.testing.assert_close(point.sigma, sigmas)
    torch.testing.assert_close(point.signal, 1 - sigmas)
    assert ((point.timestep - scheduler.timesteps).abs() < 1).all()


def test_the_stock_sampler_recovers_the_data_from_the_exact_velocity():
    scheduler = DPMSolverMultistepScheduler(**FLOW)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(1)
    x, x_t = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        x_t = scheduler.step((x_t - x) / sigma, timestep, x_t).prev_sample
    torch.testing.assert_close(x_t, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, "epsilon"),
        ({"prediction_type": "epsilon"} | SD15, "epsilon"),
        ({"prediction_type": "v_prediction"} | SD15, "v_prediction"),
        ({"prediction_type": "sample"} | SD15, "sample"),
    ],
)
def test_the_objective_follows_from_the_scheduler_config(config: dict, kind: str):
    objective = objective_from_scheduler(config)
    assert type(objective) is Objective and isinstance(objective.path, NoiseSchedule)
    assert objective.prediction is PREDICTIONS[kind]


@pytest.mark.parametrize("config", [FLOW, {"_class_name": "FlowMatchEulerDiscreteScheduler"}])
def test_flow_schedulers_of_both_kinds_give_rectified_flow(config: dict):
    assert isinstance(objective_from_scheduler(config | {"num_train_timesteps": 500}), RectifiedFlow)
    assert objective_from_scheduler(config | {"num_train_timesteps": 500}).path == StraightPath(500)


def test_edm_schedulers_give_edm_with_their_own_numbers():
    karras = objective_from_scheduler({"_class_name": "EDMEulerScheduler", "sigma_data": 0.7, "sigma_max": 40.0})
    assert karras.prediction.name == "edm" and karras.path == EDMPath(sigma_data=0.7, sigma_max=40.0)
    one = torch.ones(1, dtype=torch.float64)
    ours, theirs = (p.of(one, 2 * one, one, one) for p in (karras.prediction, edm_prediction(0.7)))
    assert torch.equal(ours, theirs)
    cosxl = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}
    assert objective_from_scheduler(cosxl).prediction.name == "v_prediction"


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (SD15, {"prediction_type": "v_prediction"}, "the recipe says .*'v_prediction'.* scheduler says 'epsilon'"),
        ({"prediction_type": "flow_prediction"}, {}, "contradicts itself"),
        ({"prediction_type": "epsilon", "use_flow_sigmas": True}, {}, "contradicts itself"),
        ({"prediction_type": "score"}, {}, "'score', expected epsilon"),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
            {},
            "sigma_data = 0.5, expected epsilon, or v_prediction with sigma_data = 1",
        ),
        ({"_class_name": "ScoreSdeVeScheduler"}, {}, "ScoreSdeVeScheduler is for unconditional"),
        (FLOW, recipe(snr_gamma=5.0), "training.snr_gamma asks for min_snr .* 'flow_prediction', expected epsilon"),
        (FLOW, recipe(loss_weighting="p2"), "training.loss_weighting asks for p2"),
        (SD15, recipe(loss_weighting="cosmap"), "cosmap .* 'epsilon', expected flow_prediction; remove it"),
        (SD15, recipe(discrete_flow_shift=3.0), "discrete_flow_shift .* 'epsilon', expected flow_prediction"),
        (SD15, recipe(use_dynamic_shifting=True), "use_dynamic_shifting do not apply"),
    ],
)
def test_a_contradiction_is_an_error_that_names_both_sides(config: dict, arguments: dict, message: str):
    with pytest.raises(BaseModelError, match=message):
        objective_from_scheduler(config, **arguments)


def test_min_snr_weighting_scales_the_loss_of_each_sample(batch: Batch):
    def zero(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    t, noise = torch.linspace(0.01, 0.99, 6), torch.ones_like(batch.latents)
    plain, weighted = (
        objective_from_scheduler(SD15, **recipe(snr_gamma=gamma)).at(zero, batch.latents, batch.prompt_embeds, t, noise)
        for gamma in (None, 5.0)
    )
    snr = SCHEDULE.snr(SCHEDULE.index(t))
    torch.testing.assert_close(weighted / plain, (min_snr(5.0)(snr) / snr).float())


def test_a_shift_moves_the_times_that_a_model_sees(batch: Batch, draw: Draw):
    seen = []

    def spy(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        seen.append(timestep.double() / 1000)
        return x_t

    for settings in ({}, {"discrete_flow_shift": 3.0}, {"use_dynamic_shifting": True}):
        objective_from_scheduler(FLOW, **recipe(**settings))(spy, batch, draw)
    odds = [t / (1 - t) for t in seen]
    torch.testing.assert_close(odds[1] / odds[0], torch.full_like(odds[0], 3), rtol=1e-4, atol=0)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256)  # FLUX.1's line at 8 x 8 latents, 16 tokens
    torch.testing.assert_close(odds[2] / odds[0], torch.full_like(odds[0], mu).exp(), rtol=1e-4, atol=0)


def test_every_name_of_the_recipe_is_in_its_table_and_the_other_way_round():
    choices = {
        name: set(get_args(TrainingConfig.model_fields[name].annotation))
        for name in ("timestep_sampling", "loss_weighting", "prediction_type")
    }
    assert choices["timestep_sampling"] == set(DENSITIES)
    assert choices["loss_weighting"] == set(WEIGHTINGS)
    assert choices["prediction_type"] == set(PREDICTIONS) | {"auto"}
