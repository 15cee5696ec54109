"""Tiny denoisers of the real classes, one for each architecture, with adapters that PEFT made on them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from components.layouts.layers import Layer
from components.layouts.names import ARCHITECTURES
from components.layouts.reading import stored_layers
from components.layouts.skeleton import Skeleton, skeleton_of_modules

RANK, ALPHA = 4, 3.0  # different on purpose: a reader that takes alpha for the rank is 25 % off


def sd() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
    )  # fmt: skip


def sdxl() -> nn.Module:
    """SDXL's blocks: the first without attention, transformers of growing depth, size conditioning."""
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(16, 16, 32), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=[1, 1, 2], addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )  # fmt: skip


def sd3() -> nn.Module:
    """SD 3.5 medium's blocks: a second attention in the first, no context output in the last."""
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=40, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip


def flux1() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=40, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def flux2() -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip


def z_image() -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[16, 16, 16],
    )  # fmt: skip


def qwen_image() -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def sana() -> nn.Module:
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, caption_channels=24,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, sample_size=8,
    )  # fmt: skip


DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "StableDiffusionPipeline": sd,
    "StableDiffusionXLPipeline": sdxl,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux1,
    "Flux2KleinPipeline": flux2,
    "ZImagePipeline": z_image,
    "QwenImagePipeline": qwen_image,
    "SanaPipeline": sana,
}


def denoiser(pipeline: str) -> nn.Module:
    torch.manual_seed(0)
    return DENOISERS[pipeline]().eval().requires_grad_(False)


@cache
def skeleton(pipeline: str) -> Skeleton:
    return skeleton_with(pipeline)


def skeleton_with(pipeline: str, **parts: nn.Module) -> Skeleton:
    part = ARCHITECTURES[pipeline].denoiser
    return skeleton_of_modules(f"tiny {pipeline}", pipeline, {part: denoiser(pipeline), **parts})


def layer_names(module: nn.Module) -> list[str]:
    """Every layer that PEFT can adapt and merge: all but grouped convolutions."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]


def adapt(module: nn.Module, config: Any, seed: int = 1) -> nn.Module:
    """Give a module an adapter whose every factor is random, so that nothing of it is zero."""
    module.add_adapter(config, adapter_name="default")  # type: ignore[operator]
    return layers_with_random_factors(module, seed)


def layers_with_random_factors(module: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(mark in name for mark in ("lora_A", "lora_B", "hada_", "lokr_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif "lora_magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    return module.eval()


def lora_config(module: nn.Module, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": layer_names(module)} | settings)  # type: ignore[arg-type]


def stored(module: nn.Module, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter as it is stored: PEFT's names under the part, and its settings."""
    settings = module.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    tensors = get_peft_model_state_dict(module, adapter_name="default")
    return (
        {f"{part}.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()},
        {f"{part}.{name}": getattr(value, "value", value) for name, value in settings.items()},
    )


def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """path -> weight with the adapter merged by PEFT, of every adapted layer."""
    merged = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            layer.merge(adapter_names=["default"])
            merged[name] = layer.base_layer.weight.detach().clone()
            layer.unmerge()
    return merged


@dataclass(frozen=True)
class Trained:
    """An adapter: as it is stored, as layers, and the weights (path -> tensor) that PEFT merges it to."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    merged: dict[str, Tensor]

    @property
    def layers(self) -> list[Layer]:
        return stored_layers(self.tensors, self.metadata)


def as_metadata(settings: dict[str, Any]) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(settings, default=sorted)}


def trained(module: nn.Module, part: str, config: Any) -> Trained:
    tensors, settings = stored(adapt(module, config), part)
    return Trained(tensors, as_metadata(settings), merged_weights(module))


@cache
def trained_lora(pipeline: str, *, use_rslora: bool = False) -> Trained:
    """A LoRA on every layer of the tiny denoiser."""
    module = denoiser(pipeline)
    return trained(module, ARCHITECTURES[pipeline].denoiser, lora_config(module, use_rslora=use_rslora))
