"""Denoisers of the sizes that people train, without weights: what their weights weigh and what a step of them costs.

The dimensions are those of the models' config.json; nothing is fetched, and on the meta device nothing is allocated.
"""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from components.config import TrainingConfig
from components.families import FAMILIES
from components.families.family import Family
from components.training.adapters import add_adapter


@dataclass(frozen=True)
class Geometry:
    """A denoiser's config, and the shapes of what it is trained on."""

    pipeline: str  # key of FAMILIES
    config: dict[str, Any]
    side: int  # pixels of a training picture
    channels: int  # of its latents
    downscale: int
    cond: dict[str, tuple[int, ...]]  # shapes of the conditioning, without the batch

    @property
    def family(self) -> Family:
        return FAMILIES[self.pipeline]

    def empty(self) -> nn.Module:
        """The denoiser on the meta device, in float32."""
        with torch.device("meta"):
            return getattr(diffusers, self.family.denoiser)(**self.config)  # type: ignore[no-any-return]

    def inputs(self, batch: int, device: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cells = self.side // self.downscale
        x_t = torch.empty(batch, self.channels, cells, cells, device=device)
        cond = {name: torch.empty(batch, *shape, device=device) for name, shape in self.cond.items()}
        return x_t, torch.empty(batch, device=device), cond


SD15 = Geometry(
    "StableDiffusionPipeline",
    {"sample_size": 64, "cross_attention_dim": 768},
    *(512, 4, 8),
    {"prompt_embeds": (77, 768)},
)
SDXL = Geometry(
    "StableDiffusionXLPipeline",
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    *(1024, 4, 8),
    {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,), "time_ids": (6,)},
)
SD35_LARGE = Geometry(
    "StableDiffusion3Pipeline",
    {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    *(1024, 16, 8),
    {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
)
FLUX1_DEV = Geometry(
    "FluxPipeline",
    {"guidance_embeds": True},
    *(1024, 16, 8),
    {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
)
QWEN_IMAGE = Geometry("QwenImagePipeline", {}, *(1024, 16, 8), {"prompt_embeds": (128, 3584)})
Z_IMAGE = Geometry("ZImagePipeline", {}, *(1024, 16, 8), {"prompt_embeds": (128, 2560)})
GEOMETRIES = {
    "sd15": SD15,
    "sdxl": SDXL,
    "sd35-large": SD35_LARGE,
    "flux1-dev": FLUX1_DEV,
    "qwen-image": QWEN_IMAGE,
    "z-image": Z_IMAGE,
}


def step_flops(geometry: Geometry, training: TrainingConfig, batch: int = 1) -> int:
    """Floating-point operations of a forward and a backward pass of a training, two to a multiply-add.

    With gradient checkpointing what is computed again counts too, as it does in HFU and does not in MFU.
    """
    denoiser: Any = geometry.empty()
    add_adapter(denoiser, geometry.family, training)
    if training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    x_t, timestep, cond = geometry.inputs(batch, "meta")
    with FlopCounterMode(display=False) as counter:
        geometry.family.denoise(denoiser, x_t, timestep, cond).square().mean().backward()
    return counter.get_total_flops()
