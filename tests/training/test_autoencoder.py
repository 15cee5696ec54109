import pytest
import torch
from diffusers import AutoencoderKL

from components.diffusion.draws import Draws
from components.training.autoencoder import (
    augment,
    fold_latent_statistics,
    new_autoencoder,
    psnr,
    pyramid_loss,
)

PIXELS = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return new_autoencoder(channels=(8, 8, 8, 8), latent_channels=4).eval()


@torch.no_grad()
def test_folding_normalises_the_latents_and_changes_no_reconstruction(model: AutoencoderKL):
    model.quant_conv.bias.add_(3.0)
    before = model.encode(PIXELS).latent_dist
    picture = model.decode(before.mean).sample
    relative_std = before.std / before.mean.std(dim=(0, 2, 3)).view(1, -1, 1, 1)
    fold_latent_statistics(model, PIXELS)
    after = model.encode(PIXELS).latent_dist
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std, relative_std, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.decode(after.mean).sample, picture, rtol=1e-3, atol=1e-3)


def test_the_loss_of_a_perfect_copy_is_zero_and_a_shift_of_brightness_costs_its_size():
    assert pyramid_loss(PIXELS, PIXELS) == 0
    torch.testing.assert_close(pyramid_loss(PIXELS + 0.25, PIXELS), torch.tensor(0.25))


def test_an_edge_in_the_wrong_place_costs_more_than_the_same_error_spread_out():
    flat, edge = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    flat += 0.25
    edge[..., ::4] = 1.0
    target = torch.zeros(1, 3, 64, 64)
    assert pyramid_loss(edge, target) > 1.3 * pyramid_loss(flat, target)


def test_psnr_follows_its_definition():
    class Darker(torch.nn.Module):
        device = torch.device("cpu")

        def encode(self, x):
            return type("Encoded", (), {"latent_dist": type("Dist", (), {"mean": x})})

        def decode(self, x):
            return type("Decoded", (), {"sample": x - 0.2})

    grey = torch.zeros(2, 3, 8, 8)
    assert abs(psnr(Darker(), grey) - 20.0) < 1e-3  # an error of 0.1 on a range of 1


def test_augmentation_repeats_itself_stays_in_range_and_leaves_half_of_the_pictures_as_they_are():
    ids = [str(i) for i in range(200)]
    pixels = PIXELS[:1].expand(200, -1, -1, -1)
    augmented = augment(pixels, Draws(0)(3, ids))
    assert torch.equal(augmented, augment(pixels, Draws(0)(3, ids)))
    assert augmented.min() >= -1.001 and augmented.max() <= 1.001
    same = ((augmented == pixels) | (augmented == pixels.flip(-1))).all(dim=(1, 2, 3)).float().mean()
    assert 0.4 < same < 0.6
