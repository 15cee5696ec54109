"""A small Stable Diffusion in which encoding a picture costs as much of a training step as in Stable Diffusion 1.5.

`python -m tests.benchmarks.proportions` prints what one picture costs in both, by the operations counted and by the CPU
time taken; the full size needs 8 GB and a minute.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny import clip_tokenizer

TOKENS = 77
DOWNSCALE = 8
RANK = 4  # the script's default
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]  # the script's


@dataclass(frozen=True, slots=True)
class Sizes:
    """What tells one Stable Diffusion 1 from another."""

    pixels: int
    unet: tuple[int, ...]  # channels of its levels, of which all but the last attend to the prompt
    heads: int | tuple[int, ...]
    layers: int
    vae: tuple[int, ...]
    groups: tuple[int, int]  # of the U-Net's and the VAE's group norms
    text_width: int
    text_layers: int
    text_heads: int
    vocabulary: int


FULL = Sizes(512, (320, 640, 1280, 1280), 8, 2, (128, 256, 512, 512), (32, 32), 768, 12, 12, 49408)  # 1.5's configs
SMALL = Sizes(128, (96, 192), (2, 4), 1, (16, 48, 96, 104), (16, 4), 64, 2, 2, 128)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one picture: its latents, its caption's embedding, its part of a training step; one unit for all."""

    encode: float
    text: float
    step: float

    @property
    def ratio(self) -> float:
        """What encoding in every step adds to a step."""
        return (self.encode + self.text) / self.step

    def __str__(self) -> str:
        return f"encode {self.encode:.4g}, text {self.text:.4g}, step {self.step:.4g}, ratio {self.ratio:.3f}"


def unet_of(sizes: Sizes) -> UNet2DConditionModel:
    """With the script's LoRA, which alone takes gradients."""
    deeper = len(sizes.unet) - 1
    unet = UNet2DConditionModel(
        sample_size=sizes.pixels // DOWNSCALE,
        layers_per_block=sizes.layers,
        block_out_channels=sizes.unet,
        down_block_types=(*["CrossAttnDownBlock2D"] * deeper, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * deeper),
        norm_num_groups=sizes.groups[0],
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,
    )
    return unet.requires_grad_(False)


def vae_of(sizes: Sizes) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.vae),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.vae),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=sizes.groups[1],
        sample_size=sizes.pixels,
    )
    return vae.requires_grad_(False).eval()


def text_encoder_of(sizes: Sizes, **special: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=TOKENS,
        **({"bos_token_id": 0, "eos_token_id": 1} | special),
    )
    return CLIPTextModel(config).requires_grad_(False).eval()


def write_base(folder: Path, sizes: Sizes) -> Path:
    """Random weights in diffusers' layout, with a tokenizer of single letters; returns `folder`."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "vocabulary")
    tokenizer.model_max_length = TOKENS
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
    )
    StableDiffusionPipeline(
        vae=vae_of(sizes),
        text_encoder=text_encoder_of(sizes, **special),
        tokenizer=tokenizer,
        unet=unet_of(sizes),
        scheduler=scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def flops(sizes: Sizes) -> Cost:
    """Floating-point operations, counted without doing them."""

    def counted(work: Callable[[], None]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())

    with torch.device("meta"):
        return Cost(*(counted(work) for work in _work(sizes, batch=1)))


def cpu_seconds(sizes: Sizes, *, batch: int, repeats: int) -> Cost:
    """Seconds of CPU, the median of `repeats` after one that does not count; taken in turns, since clocks vary."""
    work = _work(sizes, batch)
    taken: list[list[float]] = [[], [], []]
    for _ in range(repeats + 1):
        for seconds, part in zip(taken, work, strict=True):
            started = time.process_time()
            part()
            seconds.append((time.process_time() - started) / batch)
    return Cost(*(median(seconds[1:]) for seconds in taken))


def _work(sizes: Sizes, batch: int) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """Encoding, embedding, and forward with backward pass, as functions that do it."""
    vae, text_encoder, unet = vae_of(sizes), text_encoder_of(sizes), unet_of(sizes)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    side = sizes.pixels // DOWNSCALE
    pixels, latents = torch.randn(batch, 3, sizes.pixels, sizes.pixels), torch.randn(batch, 4, side, side)
    tokens, embeds = torch.zeros(batch, TOKENS, dtype=torch.long), torch.randn(batch, TOKENS, sizes.text_width)
    timesteps = torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        unet(latents, timesteps, embeds, return_dict=False)[0].square().mean().backward()

    return lambda: vae.encode(pixels) and None, lambda: text_encoder(tokens) and None, step


def main() -> None:
    torch.set_num_threads(1)
    for name, sizes, batch, repeats in (("small", SMALL, 8, 15), ("Stable Diffusion 1.5", FULL, 1, 1)):
        print(f"{name}, floating-point operations: {flops(sizes)}")
        print(f"{name}, CPU seconds: {cpu_seconds(sizes, batch=batch, repeats=repeats)}", flush=True)


if __name__ == "__main__":
    main()
