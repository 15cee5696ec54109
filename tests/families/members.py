"""Tiny pipelines of the stock classes with random weights, for every family, and what the shared tests need of each.

A new family is a builder and a line in MEMBERS.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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
    clip: bool = False  # whether its text encoders can be trained
    tokens: bool = False  # and whether the stock pipeline loads learned tokens
    sign: int = 1  # of the denoiser's output, before it is the prediction that the scheduler takes


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


INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def gemma() -> tuple[GemmaTokenizer, Gemma2Model]:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = GemmaTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.add_tokens(INSTRUCTION)  # a token a line
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return tokenizer, Gemma2Model(config)


def sana(folder: Path) -> Path:
    torch.manual_seed(5)
    tokenizer, text_encoder = gemma()
    blocks, scales = ("ResBlock", "EfficientViTBlock"), ((), (5,))
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        timestep_scale=0.5,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder


CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if not enable_thinking %}<think></think>{% endif %}"""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per byte."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": words[1:3]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(cls: type[Any], tokenizer: Qwen2Tokenizer, layers: int) -> Any:
    return cls(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def qwen_image(folder: Path) -> Path:
    torch.manual_seed(6)
    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16},
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.0, 1.5, 2.0],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192)
    text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    QwenImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


def z_image(folder: Path) -> Path:
    torch.manual_seed(7)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[2, 2, 4],
    )
    vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    text_encoder = qwen3(Qwen3Model, tokenizer, 3)
    ZImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


def flux2_klein(folder: Path) -> Path:
    """Its text encoder has the 27 layers that the stock pipeline asks for."""
    torch.manual_seed(8)
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    text_encoder = qwen3(Qwen3ForCausalLM, tokenizer, 27)
    Flux2KleinPipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


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


def _sana(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """A caption's embedding is that of a prompt; that of no caption is what guidance leads away from."""
    with torch.no_grad():
        embeds, mask, plain, plain_mask = pipeline.encode_prompt(prompts, complex_human_instruction=INSTRUCTION)
    assert (embeds - plain).abs().max() > 1e-3
    last = prompts.index("")
    embeds[last], mask[last] = plain[last], plain_mask[last]
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}


def _qwen_image(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Alone, a prompt has no mask; in a batch, it has the same embedding but for rounding."""
    with torch.no_grad():
        together, mask = pipeline.encode_prompt(prompts, max_sequence_length=512)
        alone = [pipeline.encode_prompt([prompt], max_sequence_length=512) for prompt in prompts]
    assert all(no_mask is None for _, no_mask in alone)
    embeds = torch.nn.utils.rnn.pad_sequence([embed[0] for embed, _ in alone], batch_first=True)
    torch.testing.assert_close(embeds, together)
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}


def _z_image(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        texts = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(text)) for text in texts], batch_first=True)
    return {
        "prompt_embeds": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
        "prompt_embeds_mask": mask.bool(),
    }


def _flux2(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"prompt_embeds": pipeline.encode_prompt(prompts)[0]}


def _only_latent(pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.vae.encode(pixels).latent


def _frame_mean(pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
    return posterior_mean(pipeline, pixels.unsqueeze(2))


def _frames(pipeline: Any, latents: torch.Tensor, side: int) -> torch.Tensor:
    return latents.squeeze(2)


def _flux2_pack(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    return pipeline._pack_latents(latents)


def _flux2_unpack(pipeline: Any, latents: torch.Tensor, side: int) -> torch.Tensor:
    cells = side // (2 * pipeline.vae_scale_factor)
    return latents.transpose(1, 2).reshape(len(latents), -1, cells, cells)


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
    "clip": True,
    "tokens": True,
    "pack": _flux_pack,
    "unpack": _flux_unpack,
}
MEMBERS = {
    "sd1": Member(tiny_stable_diffusion, _sd, x_t="sample", clip=True, tokens=True, recipes=("sd15",)),
    "sd2": Member(stable_diffusion_2, _sd, x_t="sample", clip=True, tokens=True, recipes=("sd21",)),
    "sdxl": Member(
        stable_diffusion_xl,
        _sdxl,
        x_t="sample",
        clip=True,
        tokens=True,
        recipes=("sdxl-12gb", "sdxl", "sdxl-80gb"),
    ),
    "sd3": Member(stable_diffusion_3, _sd3, training=SHIFTED, clip=True, recipes=("sd35-medium", "sd35-large")),
    "sd3-without-t5": Member(stable_diffusion_3_without_t5, _sd3, training=SHIFTED, clip=True),
    "flux1-dev": Member(flux, recipes=("flux1-dev",), **FLUX),
    "flux1-schnell": Member(flux_schnell, recipes=("flux1-schnell",), **FLUX),
    "sana": Member(sana, _sana, encode_pixels=_only_latent, training=SHIFTED, recipes=("sana",)),
    "qwen-image": Member(
        qwen_image,
        _qwen_image,
        side=64,
        encode_pixels=_frame_mean,
        pack=_flux_pack,
        unpack=lambda *given: _flux_unpack(*given).squeeze(2),
        training=DYNAMIC,
        recipes=("qwen-image",),
    ),
    "z-image": Member(
        z_image, _z_image, side=64, x_t="x", sign=-1, unpack=_frames, training=SHIFTED, recipes=("z-image",)
    ),
    "flux2-klein": Member(
        flux2_klein,
        _flux2,
        side=64,
        pack=_flux2_pack,
        unpack=_flux2_unpack,
        training=DYNAMIC,
        recipes=("flux2-klein",),
    ),
}
