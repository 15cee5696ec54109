from dataclasses import dataclass

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from components.diffusion.draws import Draw, Draws
from components.diffusion.objectives import (
    Epsilon,
    Objective,
    RectifiedFlow,
    Sample,
    VPrediction,
    objective_from_scheduler,
)
from components.diffusion.schedules import noise_schedule
from components.diffusion.timesteps import logit_normal
from components.diffusion.weighting import min_snr
from components.errors import BaseModelError

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULE = noise_schedule(SD15)
OBJECTIVES = [
    Epsilon(schedule=SCHEDULE), VPrediction(schedule=SCHEDULE), Sample(schedule=SCHEDULE), RectifiedFlow(),
    RectifiedFlow(to_time=logit_normal),
]  # fmt: skip


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


def exact_denoiser(objective: Objective, x: Tensor):
    """Knows the data, so it can tell noise and data apart at the timestep it is given."""

    def denoise(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        if isinstance(objective, RectifiedFlow):
            sigma = (timestep / objective.num_train_timesteps).view(-1, 1, 1, 1)
            return (x_t - x) / sigma
        alpha_cumprod = SCHEDULE.alphas_cumprod[timestep].float().view(-1, 1, 1, 1)
        noise = (x_t - alpha_cumprod.sqrt() * x) / (1 - alpha_cumprod).sqrt()
        return {"epsilon": noise, "sample": x}.get(
            objective.prediction_type, alpha_cumprod.sqrt() * noise - (1 - alpha_cumprod).sqrt() * x
        )

    return denoise


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.prediction_type)
def test_the_exact_model_has_zero_loss(objective: Objective, batch: Batch, draw: Draw):
    assert objective(exact_denoiser(objective, batch.latents), batch, draw) < 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.prediction_type)
def test_the_loss_is_the_mean_of_the_losses_per_sample_and_these_ignore_the_neighbours(
    objective: Objective, batch: Batch, draw: Draw
):
    def wrong(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        return 0.5 * x_t

    losses = objective.per_sample(wrong, batch.latents, batch.prompt_embeds, draw)
    assert losses.shape == (6,)
    torch.testing.assert_close(objective(wrong, batch, draw), losses.mean())
    alone = objective.per_sample(wrong, batch.latents[2:3], batch.prompt_embeds[2:3], Draws(0)(0, ["c"]))
    torch.testing.assert_close(alone, losses[2:3])


@pytest.mark.parametrize("kind", [Epsilon, VPrediction, Sample])
def test_paths_and_targets_agree_with_diffusers(kind: type, batch: Batch):
    scheduler = DDPMScheduler(**SD15)
    noise, t = torch.randn_like(batch.latents), torch.tensor([0.0, 0.1, 0.35, 0.5, 0.9999, 1.0])
    seen = {}

    def spy(x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        seen.update(x_t=x_t, timestep=timestep)
        return torch.zeros_like(x_t)

    losses = kind(schedule=SCHEDULE).at(spy, batch.latents, batch.prompt_embeds, t, noise)
    assert seen["timestep"].tolist() == [0, 100, 350, 500, 999, 999]
    torch.testing.assert_close(
        seen["x_t"], scheduler.add_noise(batch.latents, noise, seen["timestep"]), rtol=1e-4, atol=1e-4
    )
    target = {
        Epsilon: noise, Sample: batch.latents,
        VPrediction: scheduler.get_velocity(batch.latents, noise, seen["timestep"]),
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
        ({}, Epsilon),
        ({"prediction_type": "epsilon"} | SD15, Epsilon),
        ({"prediction_type": "v_prediction"} | SD15, VPrediction),
        ({"prediction_type": "sample"} | SD15, Sample),
        (FLOW, RectifiedFlow),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}, RectifiedFlow),
    ],
)
def test_the_objective_follows_from_the_scheduler_config(config: dict, kind: type):
    assert type(objective_from_scheduler(config)) is kind


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (SD15, {"prediction_type": "v_prediction"}, "the recipe says .*'v_prediction'.* scheduler says 'epsilon'"),
        ({"prediction_type": "flow_prediction"}, {}, "contradicts itself"),
        ({"prediction_type": "epsilon", "use_flow_sigmas": True}, {}, "contradicts itself"),
        ({"prediction_type": "score"}, {}, "'score', expected epsilon"),
        ({"_class_name": "EDMEulerScheduler"}, {}, "EDM"),
        (FLOW, {"snr_gamma": 5.0}, "snr_gamma does not apply"),
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
        objective_from_scheduler(SD15, snr_gamma=gamma).at(zero, batch.latents, batch.prompt_embeds, t, noise)
        for gamma in (None, 5.0)
    )
    expected = min_snr(5.0, "epsilon")(SCHEDULE.snr(SCHEDULE.index(t))).float()
    torch.testing.assert_close(weighted / plain, expected)
