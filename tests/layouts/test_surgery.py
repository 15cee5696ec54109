"""Theorems about merging, extracting and resizing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from components.config import BaseModelConfig
from components.errors import BadInput
from components.families.bases import resolve_base
from components.layouts.layers import Layer, fuse, spelled_out, split
from components.layouts.skeleton import Skeleton, skeleton_of
from components.layouts.surgery import extract, merge, resize
from tests.layouts.models import denoiser, layer_names, lora_config, skeleton, trained, trained_lora
from tests.tiny import tiny_stable_diffusion

SD = "StableDiffusionPipeline"


def tuned(bones: Skeleton, weights: dict[str, Tensor]) -> Skeleton:
    """The same base with some of its weights replaced."""
    return replace(bones, name="tuned", weight=lambda part, path: weights.get(path, bones.weight(part, path)))


@pytest.fixture(scope="module")
def shifted() -> dict[str, Tensor]:
    """Every layer of the tiny U-Net moved by a full matrix."""
    generator = torch.Generator().manual_seed(3)
    return {
        path: skeleton(SD).weight("unet", path) + torch.randn(shape, generator=generator) * 0.05
        for path, shape in skeleton(SD).shapes["unet"].items()
    }


def test_extraction_at_full_rank_reproduces_the_tuned_weights(shifted: dict[str, Tensor]):
    fitted = extract(skeleton(SD), tuned(skeleton(SD), shifted), rank=10_000)
    assert {layer.path for layer in fitted.layers} == set(shifted)
    for layer in fitted.layers:
        assert (layer.applied_to(skeleton(SD).weight("unet", layer.path)) - shifted[layer.path]).abs().max() < 1e-6
    assert fitted.error == 0.0


def test_truncation_loses_the_tail_singular_values_and_nothing_more(shifted: dict[str, Tensor]):
    """Eckart-Young: the Frobenius error is the norm of the singular values that were cut, layer by layer and in all."""
    rank, lost, whole = 3, 0.0, 0.0
    fitted = extract(skeleton(SD), tuned(skeleton(SD), shifted), rank)
    for layer in fitted.layers:
        change = (shifted[layer.path] - skeleton(SD).weight("unet", layer.path)).double()
        values = torch.linalg.svdvals(change.flatten(1))
        tail = values[rank:].norm().item()
        assert (change - layer.delta().double()).norm().item() == pytest.approx(tail, rel=1e-4, abs=1e-6)
        assert fitted.errors[layer.name] == pytest.approx(tail / values.norm().item(), rel=1e-6, abs=1e-9)
        lost, whole = lost + tail**2, whole + values.square().sum().item()
    assert fitted.error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)


def test_extraction_finds_an_adapter_again_from_the_weights_it_was_merged_into():
    adapter = trained_lora(SD)
    fitted = extract(skeleton(SD), tuned(skeleton(SD), adapter.merged), rank=4)
    assert fitted.error < 1e-5  # float32 weights
    updates = {layer.path: layer.delta() for layer in adapter.layers}
    for layer in fitted.layers:
        assert (layer.delta() - updates[layer.path]).abs().max() < 1e-5


def test_extraction_refuses_equal_checkpoints_and_other_architectures():
    with pytest.raises(BadInput, match="have the same weights"):
        extract(skeleton(SD), tuned(skeleton(SD), {}), 4)
    other = replace(skeleton("StableDiffusionXLPipeline"), name="other")
    with pytest.raises(BadInput, match="extract from two checkpoints of one architecture"):
        extract(skeleton(SD), other, 4)


def test_resizing_to_the_rank_or_more_is_exact_and_changes_no_number():
    layers = trained_lora(SD).layers
    for rank in (4, 64):
        fitted = resize(layers, rank)
        assert fitted.error == 0.0
        assert all(mine is theirs for mine, theirs in zip(fitted.layers, layers, strict=True))


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
def test_resizing_keeps_the_largest_singular_values_of_the_update(kind: str):
    from peft import LoHaConfig

    module = denoiser(SD)
    names = [name for name in layer_names(module) if "attn" in name or "conv1" in name]
    config = (
        lora_config(module, target_modules=names)
        if kind == "LoRA"
        else LoHaConfig(r=4, alpha=3.0, target_modules=names)
    )  # type: ignore[arg-type]
    layers = trained(module, "unet", config).layers
    fitted = resize(layers, 2)
    for before, after in zip(layers, fitted.layers, strict=True):
        assert (after.kind, after.rank) == ("lora", 2)
        update = before.delta().double().flatten(1)
        values = torch.linalg.svdvals(update)
        left = after.delta().double().flatten(1)
        assert torch.allclose(torch.linalg.svdvals(left)[:2], values[:2], rtol=1e-5)
        assert (update - left).norm().item() == pytest.approx(values[2:].norm().item(), rel=1e-4)
        assert fitted.errors[after.name] == pytest.approx((values[2:].norm() / values.norm()).item(), rel=1e-5)


def test_dora_is_not_resized():
    module = denoiser(SD)
    layers = trained(module, "unet", lora_config(module, target_modules=["conv_in"], use_dora=True)).layers
    with pytest.raises(BadInput, match="DoRA cannot be resized"):
        resize(layers, 1)


def test_a_merged_pipeline_has_the_adapter_in_its_weights_and_everything_else_as_it_was(tmp_path: Path):
    base = tiny_stable_diffusion(tmp_path / "base")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    adapter = trained(unet, "unet", lora_config(unet))  # type: ignore[arg-type]
    found = resolve_base(BaseModelConfig(model=str(base)))
    folder = merge(found, adapter.layers, tmp_path / "merged")
    merged = StableDiffusionPipeline.from_pretrained(folder).unet.state_dict()
    before = UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
    assert sorted(merged) == sorted(before)
    for name, tensor in before.items():
        expected = adapter.merged.get(name.removesuffix(".weight"), tensor)
        assert torch.allclose(merged[name], expected, atol=2e-6), name
    assert (folder / "unet" / "config.json").read_bytes() == (base / "unet" / "config.json").read_bytes()
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (base / weights).read_bytes()
    assert extract(skeleton_of(found), skeleton_of(resolve_base(BaseModelConfig(model=str(folder)))), 4).error < 1e-5
    with pytest.raises(BadInput, match="exists already"):
        merge(found, adapter.layers, folder)


def test_a_merge_keeps_the_precision_of_every_file_and_refuses_what_it_cannot_hold(tmp_path: Path):
    base = tiny_stable_diffusion(tmp_path / "base")
    half = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float16)
    half.save_pretrained(base / "unet")
    found = resolve_base(BaseModelConfig(model=str(base)))
    factors = {"down": torch.ones(1, 4, 3, 3), "up": torch.ones(16, 1, 1, 1)}
    folder = merge(found, [Layer("unet", "conv_in", "lora", factors, 0.5)], tmp_path / "merged")
    name = "unet/diffusion_pytorch_model.safetensors"
    with safe_open(base / name, "pt") as old, safe_open(folder / name, "pt") as new:
        assert old.metadata() == new.metadata()
        assert new.get_tensor("conv_in.weight").dtype == torch.float16
        assert torch.equal(new.get_tensor("conv_in.weight"), (old.get_tensor("conv_in.weight").float() + 0.5).half())
        assert torch.equal(new.get_tensor("conv_out.weight"), old.get_tensor("conv_out.weight"))
    with pytest.raises(BadInput, match=r"not finite in torch\.float16"):
        merge(found, [Layer("unet", "conv_in", "lora", factors, 1e6)], tmp_path / "too strong")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_spelling_an_adapter_out_loses_nothing():
    layers = trained_lora(SD).layers
    for layer in layers[:8]:
        weight = skeleton(SD).weight("unet", layer.path)
        assert torch.equal(spelled_out(layer, weight).delta(), layer.delta())


def test_fused_is_the_stack_of_the_parts_and_splitting_a_dense_one_shares_its_down():
    generator = torch.Generator().manual_seed(0)

    def part(path: str, out: int, rank: int, scale: float) -> Layer:
        factors = {"down": torch.randn(rank, 6, generator=generator), "up": torch.randn(out, rank, generator=generator)}
        return Layer("transformer", path, "lora", factors, scale)

    q, v = part("q", 4, 2, 1.5), part("v", 8, 3, 0.5)
    fused = fuse([q, None, v], [4, 5, 8], "qkv")
    assert fused.rank == 5
    assert torch.allclose(fused.delta(), torch.cat([q.delta(), torch.zeros(5, 6), v.delta()]), atol=1e-6)
    back = split(fused, ["q", "k", "v"], [4, 5, 8])
    assert [(layer.path, layer.rank) for layer in back] == [("q", 2), ("v", 3)]
    dense = part("qkv", 17, 3, 2.0)
    pieces = split(dense, ["q", "k", "v"], [4, 5, 8])
    assert torch.equal(torch.cat([piece.delta() for piece in pieces]), dense.delta())
    assert all(torch.equal(piece.weights["down"], dense.weights["down"]) for piece in pieces)
