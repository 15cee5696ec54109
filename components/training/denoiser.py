"""The denoiser of the embedded base and the text encoder that is trained with it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from components.diffusion.draws import Draw
from components.diffusion.objectives import Objective
from components.diffusion.timesteps import stratified
from components.training.autoencoder import posterior_of
from components.training.captions import BOS, EMPTY_PROMPT, EOS, caption
from components.training.order import epoch_order
from components.training.pictures import Picture, Pictures


@dataclass(frozen=True, slots=True)
class CaptionedLatents:
    """Latents with the pictures that captions are made from; `sample_ids` are the pictures' file names."""

    sample_ids: tuple[str, ...]
    pictures: tuple[Picture, ...]
    latents: Tensor  # (B, C, H, W)

    def __getitem__(self, rows: slice) -> "CaptionedLatents":
        return CaptionedLatents(self.sample_ids[rows], self.pictures[rows], self.latents[rows])


class TextToLatents(nn.Module):
    """Text encoder and U-Net as one trainable module."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.tokenizer, self.text_encoder, self.unet = tokenizer, text_encoder, unet

    def prompt_embeds(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) as the stock pipeline computes them: padded to the tokenizer's length, without a mask."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.unet.device))[0]

    def forward(self, x_t: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        return self.unet(x_t, timestep, encoder_hidden_states=prompt_embeds).sample


def new_text_encoder(tokenizer: CLIPTokenizer, hidden_size: int, layers: int) -> CLIPTextModel:
    """An untrained CLIP text encoder for the tokenizer's vocabulary and length."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 48,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.convert_tokens_to_ids(BOS),  # pyright: ignore[reportArgumentType]
            eos_token_id=tokenizer.convert_tokens_to_ids(EOS),  # pyright: ignore[reportArgumentType]
            pad_token_id=tokenizer.convert_tokens_to_ids(EOS),  # pyright: ignore[reportArgumentType]
            projection_dim=hidden_size,
        )
    )


def new_unet(
    channels: tuple[int, ...], layers_per_block: int, text_size: int, latent_channels: int, sample_size: int
) -> UNet2DConditionModel:
    """An untrained U-Net with cross-attention at every level; heads are 48 wide, narrower ones are slow on a CPU."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=text_size,
        # Numbers of heads, by the name that diffusers kept for them.
        attention_head_dim=tuple(width // 48 for width in channels),  # pyright: ignore[reportArgumentType]
        norm_num_groups=16,
    )


def denoising_loss(
    model: TextToLatents, objective: Objective, batch: CaptionedLatents, draw: Draw, *, caption_dropout: float
) -> Tensor:
    """The objective's mean over a batch whose captions are drawn afresh and sometimes left empty; scalar."""
    size = len(batch.pictures)
    dropped, wording, styling = (draw.uniform(size, purpose) for purpose in ("dropout", "wording", "styling"))
    prompts = [
        EMPTY_PROMPT if dropped[i] < caption_dropout else caption(picture, wording[i].item(), styling[i].item())
        for i, picture in enumerate(batch.pictures)
    ]
    return objective.per_sample(model, batch.latents, model.prompt_embeds(prompts), draw).mean()


def fixed_noise_loss(model: TextToLatents, objective: Objective, rows: Sequence[Picture], latents: Tensor) -> float:
    """The objective with the same noise and evenly spread times at every call: comparable over a run."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    t = stratified(torch.full((len(latents),), 0.5)).to(latents.device)
    with torch.no_grad():
        prompt_embeds = model.prompt_embeds([f"{row.name}, {row.style} style" for row in rows])
        return objective.at(model, latents, prompt_embeds, t, noise).mean().item()


def probe_of(pictures: Pictures, latents: Tensor, size: int = 128) -> tuple[list[Picture], Tensor]:
    """The first `size` pictures by hash, so that times, which are given by place, do not follow the emoji's order."""
    order = epoch_order(0, 0, pictures.sample_ids)[:size]
    return [pictures.rows[i] for i in order], latents[list(order)]


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Latent means (N, C, h, w) of pixels (N, 3, H, W) in [-1, 1], on the autoencoder's device."""
    chunks = pixels.split(batch_size)
    return torch.cat([posterior_of(vae, chunk.to(vae.device)).mean for chunk in chunks])
