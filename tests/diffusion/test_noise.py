"""What is done to the noise keeps the draws pure and the statistics as written."""

import pytest
import torch

from components.config import TrainingConfig
from components.diffusion.draws import Draws
from components.diffusion.noise import INPUT_NOISES, NOISES, Noising, chosen, offset, perturbed, pyramid, white
from components.diffusion.objectives import RectifiedFlow

MANY = Draws(0)(3, [str(i) for i in range(3000)])
SETTINGS = [
    {"noise_offset": 0.1},
    {"multires_noise_iterations": 3, "multires_noise_discount": 0.5},
    {"ip_noise_gamma": 0.1},
]


def made(noising: Noising) -> torch.Tensor:
    return noising(MANY.normal((3000, 2, 4, 6)), MANY)


def test_white_noise_is_what_was_drawn_and_what_a_plain_recipe_gets():
    noise = MANY.normal((3000, 2, 4, 6))
    assert white(noise, MANY) is noise
    assert chosen(NOISES, TrainingConfig()) is white and chosen(INPUT_NOISES, TrainingConfig()) is white


def test_an_offset_is_shared_by_the_pixels_of_a_channel_and_by_nothing_else():
    noise = made(lambda noise, draw: offset(noise, draw, strength=0.5))
    covariance = torch.cov(noise.flatten(1).T).double()  # (48, 48)
    expected = torch.eye(48) + 0.25 * torch.block_diag(torch.ones(24, 24), torch.ones(24, 24))
    assert (covariance - expected).abs().max() < 5 * 1.25 * (2 / 3000) ** 0.5


def test_pyramid_noise_has_variance_1_at_every_pixel_and_neighbours_that_agree():
    noise = made(lambda noise, draw: pyramid(noise, draw, iterations=6, discount=0.8))
    assert ((noise.var(dim=0) - 1).abs() < 5 * (2 / 3000) ** 0.5).all()
    beside = (noise[..., 1:] * noise[..., :-1]).mean(dim=(0, 1, 2))
    assert (beside > 0.15).all()
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 0.02  # channels stay independent


def test_pyramid_noise_adds_a_level_per_iteration_until_a_side_is_one_pixel():
    draw = Draws(0)(3, ["a", "b"])
    levels = [pyramid(draw.normal((2, 2, 4, 6)), draw, iterations=n, discount=0.5) for n in (1, 2, 3)]
    assert not torch.equal(levels[0], levels[1])
    assert torch.equal(levels[1], levels[2])  # 4 x 6 -> 2 x 3 -> 1 x 1


def test_pyramid_noise_with_hardly_any_discount_left_is_white():
    draw = Draws(0)(3, ["a", "b"])
    noise = draw.normal((2, 2, 4, 6))
    torch.testing.assert_close(pyramid(noise, draw, iterations=2, discount=1e-6), noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_a_sample_gets_its_noise_whatever_its_neighbours_and_nothing_else_moves(settings: dict):
    training = TrainingConfig(**settings)
    noising = next(
        build(training) for table in (NOISES, INPUT_NOISES) for key, build in table.items() if key in settings
    )
    crowd, alone = Draws(5)(2, ["a", "b", "c"]), Draws(5)(2, ["b"])
    together = noising(crowd.normal((3, 2, 8, 8)), crowd)
    by_itself = noising(alone.normal((1, 2, 8, 8)), alone)
    torch.testing.assert_close(by_itself[0], together[1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(together, crowd.normal((3, 2, 8, 8)))
    assert torch.equal(crowd.uniform(3), Draws(5)(2, ["a", "b", "c"]).uniform(3))


def test_input_perturbation_is_seen_by_the_model_and_is_not_in_its_target():
    draw, latents = Draws(1)(0, ["a", "b"]), torch.zeros(2, 4, 8, 8)
    plain = draw.normal(latents.shape)
    seen = {}

    def spy(x_t, timestep, prompt_embeds):
        seen["noise"] = x_t / (timestep / 1000).view(-1, 1, 1, 1)
        return plain  # on zero latents the velocity is the noise

    objective = RectifiedFlow(input_noise=lambda noise, draw: perturbed(noise, draw, gamma=0.3))
    assert objective.per_sample(spy, latents, None, draw).max() < 1e-12
    added = seen["noise"] - plain
    assert added.std() == pytest.approx(0.3, rel=0.1) and abs((added * plain).mean()) < 0.05


def test_an_offset_is_in_the_target_too():
    draw, latents = Draws(1)(0, ["a", "b"]), torch.zeros(2, 4, 8, 8)
    objective = RectifiedFlow(noise=lambda noise, draw: offset(noise, draw, strength=0.3))

    def exact(x_t, timestep, prompt_embeds):
        return x_t / (timestep / 1000).view(-1, 1, 1, 1)

    assert objective.per_sample(exact, latents, None, draw).max() < 1e-9
    assert objective.per_sample(lambda *_: draw.normal(latents.shape), latents, None, draw).min() > 1e-3


def test_levels_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="iterations is 0"):
        pyramid(torch.zeros(1, 1, 4, 4), Draws(0)(0, ["a"]), iterations=0, discount=0.5)
