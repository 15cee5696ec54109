"""Encoding in bfloat16: taken where the latents agree, under a key of its own, and left where they do not."""

from pathlib import Path

import pytest
import torch

from components.config import BaseModelConfig
from components.families import autoencoders
from components.families.autoencoders import GaussianEncoder, HalfEncoder, half_where_it_agrees
from components.families.bases import EMBEDDED, resolve_base
from components.latents.keys import pixel_encoder_key
from tests.families.members import MEMBERS

SIDE = 64  # pixels


@pytest.fixture
def encoder() -> GaussianEncoder:
    return GaussianEncoder(EMBEDDED, "cpu")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_latents_in_bfloat16_are_those_in_float32_to_a_fiftieth_of_their_spread(
    encoder: GaussianEncoder, pixels: torch.Tensor
):
    exact = encoder.encode(pixels)
    half = half_where_it_agrees(encoder, SIDE, "cpu")
    assert isinstance(half, HalfEncoder)
    rounded = half.encode(pixels)
    for name, tensor in exact.items():
        assert rounded[name].dtype == torch.float32 and not torch.equal(rounded[name], tensor)
        assert (rounded[name] - tensor).square().mean().sqrt() < 0.02 * tensor.std()


def test_where_they_differ_the_encoder_stays_as_it_was_to_the_bit(
    encoder: GaussianEncoder, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    exact = encoder.encode(pixels)
    monkeypatch.setattr(autoencoders, "AGREEMENT", 1e-9)
    left = half_where_it_agrees(encoder, SIDE, "cpu")
    assert left is encoder
    assert all(torch.equal(left.encode(pixels)[name], tensor) for name, tensor in exact.items())


def test_an_autoencoder_of_videos_has_a_half_as_well(tmp_path: Path):
    """Its kernels have five axes, for which there are no channels last in two dimensions."""
    member = MEMBERS["qwen-image"]
    base = resolve_base(BaseModelConfig(model=str(member.build(tmp_path / "base"))))
    encoder = base.architecture.load_pixel_encoder(base.path, "cpu")
    half = half_where_it_agrees(encoder, member.side, "cpu")
    assert isinstance(half, HalfEncoder)
    pixels = torch.rand(2, 3, member.side, member.side)
    exact, rounded = encoder.encode(pixels), half.encode(pixels)
    assert all(rounded[name].shape == tensor.shape for name, tensor in exact.items())


def test_an_encoder_that_overflows_in_bfloat16_is_left_alone(encoder: GaussianEncoder):
    with torch.no_grad():
        encoder.vae.quant_conv.bias.fill_(float("nan"))
    assert half_where_it_agrees(encoder, SIDE, "cpu") is encoder


def test_latents_of_another_precision_are_others():
    keys = {pixel_encoder_key(resolve_base(BaseModelConfig(vae_precision=precision))) for precision in ("fp32", "bf16")}
    assert len(keys) == 2
