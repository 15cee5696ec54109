"""Stable Diffusion 1.x / 2.x and their like: AutoencoderKL, one CLIP text encoder, UNet2DConditionModel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.family import Family, Geometry, read_config
from components.families.text import ClipPromptEncoder, ClipPrompts, TextModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from components.families.family import Tensors

ATTENTION = ("to_q", "to_k", "to_v", r"to_out\.0")
FEED_FORWARD = (r"ff\.net\.0\.proj", r"ff\.net\.2")
PROJECTION = ("proj_in", "proj_out", "time_emb_proj")
RESAMPLING = (r"downsamplers\.0\.conv", r"upsamplers\.0\.conv")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", *RESAMPLING, "conv_in", "conv_out")
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": ATTENTION + FEED_FORWARD,
    "all-linear": ATTENTION + FEED_FORWARD + PROJECTION,
    "all": ATTENTION + FEED_FORWARD + PROJECTION + CONVOLUTION,
}
SD2_WIDTH = 1024  # of the text encoder of 2.x; 1.x has 768


class OneClip(ClipPrompts):
    """One CLIP text encoder: `prompt_embeds` (B, L, D), the last hidden state that the stock pipeline passes on."""

    def condition(self, prompts: Sequence[str], others: "Tensors") -> "Tensors":
        return {"prompt_embeds": self.clips[0](prompts)[0]}


class StableDiffusion(Family):
    """The family of the Latent Diffusion paper (Rombach et al. 2022, arXiv:2112.10752) as diffusers lays it out."""

    name = "stable-diffusion"
    pipeline = "StableDiffusionPipeline"
    denoiser = "UNet2DConditionModel"
    denoiser_part = "unet"
    parts = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    prompt_parts = ("text_encoder", "tokenizer")
    clip_parts = ("text_encoder",)
    precision = "float32"
    targets = TARGETS

    def geometry(self, base: Path) -> Geometry:
        vae, unet = read_config(base, "vae"), read_config(base, "unet")
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        resolution = unet["sample_size"] * downscale
        step = downscale * 2 ** (len(unet["block_out_channels"]) - 1)  # what the U-Net can halve and double again
        return Geometry.of(resolution, step, downscale, vae["latent_channels"])

    def unfit_samplers(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        return "flow_euler", "flow_heun"  # without the `init_noise_sigma` that these pipelines ask for

    def modelspec(self, base: Path) -> str:
        if read_config(base, "unet").get("cross_attention_dim") != SD2_WIDTH:
            return "stable-diffusion-v1"
        v = self.scheduler_config(base).get("prediction_type") == "v_prediction"
        return "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"

    def load_prompt_encoder(self, base: Path, device: str) -> ClipPromptEncoder:
        return ClipPromptEncoder(self.load_clip_prompts(base, device, self.dtype(device)))

    def load_clip_prompts(self, base: Path, device: str, dtype: "torch.dtype") -> ClipPrompts:
        return OneClip(TextModel(base, 1, "CLIPTokenizer", "CLIPTextModel", device, dtype))

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,), cond["prompt_embeds"] (B, L, D) -> (B, C, h, w)."""
        return denoiser(x_t, timestep, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
