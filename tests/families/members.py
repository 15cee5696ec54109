"""Tiny pipelines of the stock classes with random weights, for every family, and what the shared tests need of each.

A new family is a builder and a line in MEMBERS.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.tiny import LETTERS, clip_tokenizer, tiny_stable_diffusion

WIDTH = 16  # of text encoders and transformers


def posterior_mean(pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.vae.encode(pixels).latent_dist.mean


def as_it_is(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    return latents


def unpacked_as_it_is(pipeline: Any, latents: torch.Tensor, side: int) -> torch.Tensor:
    return latents


@dataclass(frozen=True, slots=True)
class Member:
    """One base of one family, and how the stock pipeline is asked about it."""

    build: Callable[[Path], Path]
    encode_prompt: Callable[[Any, list[str]], dict[str, torch.Tensor]]  # the stock pipeline's, by our tensors' names
    side: int = 32  # pixels of a training picture
    training: dict[str, Any] = field(default_factory=dict)  # settings that the family's recipe has
    recipes: tuple[str, ...] = ()  # packaged ones that train a base of this kind
    x_t: str = "hidden_states"  # the denoiser's argument that is the noisy latents
    encode_pixels: Callable[[Any, torch.Tensor], torch.Tensor] = posterior_mean  # as the pipeline's decoder takes them
    pack: Callable[[Any, torch.Tensor], torch.Tensor] = as_it_is  # latents to the pipeline's layout
    unpack: Callable[[Any, torch.Tensor, int], torch.Tensor] = unpacked_as_it_is  # and back, for a side in pixels


def autoencoder(*, levels: int = 3, channels: int = 4, **config: Any) -> AutoencoderKL:
    """A VAE whose latents have 1 / 2^(levels - 1) of the picture's sides."""
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        latent_channels=channels,
        layers_per_block=1,
        **config,
    )


def clip(cls: type[Any], tokenizer: CLIPTokenizer, width: int = WIDTH) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *((letter, -3.0) for letter in LETTERS)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T5EncoderModel(config)


def stable_diffusion_2(folder: Path) -> Path:
    """2.1: v prediction, one width of attention heads per level, linear projections."""
    return tiny_stable_diffusion(
        folder,
        seed=1,
        prediction_type="v_prediction",
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )


def stable_diffusion_xl(folder: Path) -> Path:
    torch.manual_seed(2)
    tokenizer = clip_tokenizer(folder / "vocabulary")
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip(CLIPTextModel, tokenizer),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def stable_diffusion_3(folder: Path, *, with_t5: bool = True) -> Path:
    torch.manual_seed(3)
    tokenizer = clip_tokenizer(folder / "vocabulary")
    tokenizer_3, text_encoder_3 = t5(2 * WIDTH) if with_t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        vae=autoencoder(levels=2, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        text_encoder_3=text_encoder_3,  # type: ignore[arg-type]
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,  # type: ignore[arg-type]
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def stable_diffusion_3_without_t5(folder: Path) -> Path:
    return stable_diffusion_3(folder, with_t5=False)


def flux(folder: Path, *, guided: bool = True) -> Path:
    """dev, or schnell: the one is told a guidance, the other's times are not shifted by the resolution."""
    torch.manual_seed(4)
    tokenizer = clip_tokenizer(folder / "vocabulary")
    tokenizer_2, text_encoder_2 = t5(2 * WIDTH)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guided,
    )
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if guided
        else FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    FluxPipeline(
        vae=autoencoder(levels=4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=clip(CLIPTextModel, tokenizer),
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=scheduler,
    ).save_pretrained(folder)
    return folder


def flux_schnell(folder: Path) -> Path:
    return flux(folder, guided=False)


def _sd(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": pipeline.encode_prompt(prompts, "cpu", 1, False)[0]}


def _sdxl(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _sd3(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _flux(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    tokens = 512 if pipeline.transformer.config.guidance_embeds else 256
    embeds, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=tokens)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _flux_pack(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    return pipeline._pack_latents(latents, *latents.shape)


def _flux_unpack(pipeline: Any, latents: torch.Tensor, side: int) -> torch.Tensor:
    return pipeline._unpack_latents(latents, side, side, pipeline.vae_scale_factor)


DYNAMIC = {"use_dynamic_shifting": True}
SHIFTED = {"discrete_flow_shift": 3.0, "timestep_sampling": "logit_normal"}
FLUX: dict[str, Any] = {
    "side": 64,
    "encode_prompt": _flux,
    "training": DYNAMIC,
    "pack": _flux_pack,
    "unpack": _flux_unpack,
}
MEMBERS = {
    "sd1": Member(tiny_stable_diffusion, _sd, x_t="sample", recipes=("sd15",)),
    "sd2": Member(stable_diffusion_2, _sd, x_t="sample", recipes=("sd21",)),
    "sdxl": Member(stable_diffusion_xl, _sdxl, x_t="sample", recipes=("sdxl-12gb", "sdxl", "sdxl-80gb")),
    "sd3": Member(stable_diffusion_3, _sd3, training=SHIFTED, recipes=("sd35-medium", "sd35-large")),
    "sd3-without-t5": Member(stable_diffusion_3_without_t5, _sd3, training=SHIFTED),
    "flux1-dev": Member(flux, recipes=("flux1-dev",), **FLUX),
    "flux1-schnell": Member(flux_schnell, recipes=("flux1-schnell",), **FLUX),
}
