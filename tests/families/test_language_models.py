"""Families whose prompts a language model reads: what the shared tests cannot say of all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components.families import FAMILIES
from components.families.family import Family
from tests.families.members import MEMBERS, flux2_klein, qwen_image, z_image


def drawn(family: Family, base: Path, guidance_scale: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the scheduler is told in the only step, for two pictures, and what the denoiser said before."""
    pipeline = family.load_pipeline(base, "cpu", torch.float32)
    told: list[torch.Tensor] = []
    said: list[Any] = []
    step = pipeline.scheduler.step

    def note(prediction: torch.Tensor, *rest: Any, **how: Any) -> Any:
        told.append(prediction)
        return step(prediction, *rest, **how)

    pipeline.scheduler.step = note
    pipeline.transformer.register_forward_hook(lambda module, args, output: said.append(output[0]))
    pipeline(
        ["a red disc", "a blue square that is longer"],
        num_inference_steps=1,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **family.generation_options(pipeline, guidance_scale, 2),
    )
    return told[0], [torch.stack(output).squeeze(2) if isinstance(output, list) else output for output in said]


def test_guidance_of_z_image_is_counted_from_one_as_everywhere(tmp_path: Path):
    """The stock pipeline counts from 0: at its s the prediction is uncond + (s + 1) (cond - uncond)."""
    family, base = FAMILIES["ZImagePipeline"], z_image(tmp_path)
    told, (both,) = drawn(family, base, 3.0)
    cond, uncond = both.chunk(2)
    torch.testing.assert_close(told, -(uncond + 3 * (cond - uncond)))
    told, (alone,) = drawn(family, base, 1.0)
    assert torch.equal(told, -alone)


def test_guidance_of_qwen_image_leads_every_picture_of_a_batch_away_from_the_empty_prompt(tmp_path: Path):
    """To a direction of the guided prediction, with the length of the prompt's own."""
    told, (cond, uncond) = drawn(FAMILIES["QwenImagePipeline"], qwen_image(tmp_path), 3.0)
    guided = uncond + 3 * (cond - uncond)
    torch.testing.assert_close(told, guided * cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def test_no_layer_of_qwen_image_is_adapted_whose_output_is_thrown_away(tmp_path: Path):
    """Every layer that takes an adapter has a gradient, and every other that a preset names has none."""
    family, base = FAMILIES["QwenImagePipeline"], qwen_image(tmp_path)
    denoiser = family.load_denoiser(base, "cpu")
    cond = {"prompt_embeds": torch.randn(1, 5, 16), "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.bool)}
    family.denoise(denoiser, torch.randn(1, 4, 4, 4), torch.tensor([500.0]), cond).square().mean().backward()
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    learning = [name for name, layer in layers.items() if layer.weight.grad is not None and layer.weight.grad.any()]
    assert family.target_modules(denoiser, "all") == learning and len(learning) == len(layers) - 4


def test_latents_of_flux2_are_normalised_by_the_statistics_of_its_autoencoder(tmp_path: Path):
    """Those of its batch normalisation, in evaluation, but for its scale: the layer itself gives the same numbers."""
    family, base = FAMILIES["Flux2KleinPipeline"], flux2_klein(tmp_path)
    encoded = family.load_pixel_encoder(base, "cpu").encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    vae = family.load_pipeline(base, "cpu", torch.float32).vae.eval()
    latents = family.scaled_latents(base)(encoded, torch.zeros)
    assert encoded["latent"].shape == (2, 16, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(latents, vae.bn(encoded["latent"]))


@pytest.mark.parametrize("name", ["sana", "qwen-image", "z-image"])
def test_the_bits_of_an_embedding_depend_on_no_neighbour(name: str, tmp_path: Path):
    """The cache encodes full micro-batches in any company, some of it empty."""
    base = MEMBERS[name].build(tmp_path)
    encoder = next(family for family in FAMILIES.values() if family.name == name).load_prompt_encoder(base, "cpu")
    first, second = (encoder.encode(["a red disc", *others]) for others in (["", "b"], ["a longer one", "c"]))
    length = int(first["prompt_embeds_mask"][0].sum())
    assert second["prompt_embeds_mask"][0].sum() == length
    assert torch.equal(first["prompt_embeds"][0, :length], second["prompt_embeds"][0, :length])
