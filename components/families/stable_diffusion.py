"""Stable Diffusion 1.x / 2.x and their like: AutoencoderKL, one CLIP text encoder, UNet2DConditionModel."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.family import Geometry, LatentScaling

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTION = ("proj_in", "proj_out", "time_emb_proj")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out")
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": ATTENTION + FEED_FORWARD,
    "all-linear": ATTENTION + FEED_FORWARD + PROJECTION,
    "all": ATTENTION + FEED_FORWARD + PROJECTION + CONVOLUTION,
}
SMALL_BASE = 256  # pixels; bases trained below this have no room for buckets and take squares only
BUCKET_STEP = 64


class AutoencoderEncoder:
    """A Gaussian VAE: what is cached is its posterior, `mean` and `logvar`, both (B, C, H/f, W/f) float32."""

    def __init__(self, base: Path, device: str):
        import torch
        from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

        self._vae: Any = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32).eval()
        self._vae.to(device)
        self._device = device

    def encode(self, pixels: "Tensor") -> "dict[str, Tensor]":
        import torch

        with torch.inference_mode():
            posterior = self._vae.encode(pixels.to(self._device)).latent_dist
        return {"mean": posterior.mean.cpu(), "logvar": posterior.logvar.cpu()}


class ClipPromptEncoder:
    """One CLIP text encoder: `prompt_embeds` (B, L, D), the last hidden state that the stock pipeline passes on."""

    def __init__(self, base: Path, device: str):
        import torch
        from transformers import CLIPTextModel, CLIPTokenizer

        self._tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        self._model: Any = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32).eval()
        self._model.to(device)
        self._device = device

    def encode(self, prompts: Sequence[str]) -> "dict[str, Tensor]":
        import torch

        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=self._tokenizer.model_max_length,
        )
        mask = None
        if getattr(self._model.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self._device)
        with torch.inference_mode():
            return {"prompt_embeds": self._model(tokens.input_ids.to(self._device), attention_mask=mask)[0].cpu()}

    def count_tokens(self, prompt: str) -> int:
        return len(self._tokenizer(prompt).input_ids)


class StableDiffusion:
    """The family of the Latent Diffusion paper (Rombach et al. 2022, arXiv:2112.10752) as diffusers lays it out."""

    name: str = "stable-diffusion"
    parts: tuple[str, ...] = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pixel_parts: tuple[str, ...] = ("vae",)
    prompt_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    denoiser_part: str = "unet"

    def geometry(self, base: Path) -> Geometry:
        vae = json.loads((base / "vae" / "config.json").read_text())
        unet = json.loads((base / "unet" / "config.json").read_text())
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        resolution = unet["sample_size"] * downscale
        if resolution < SMALL_BASE:
            step = downscale * 2 ** (len(unet["block_out_channels"]) - 1)  # what the U-Net can halve and double again
            return Geometry(resolution, step, resolution, downscale, vae["latent_channels"])
        return Geometry(resolution, BUCKET_STEP, SMALL_BASE, downscale, vae["latent_channels"])

    def scheduler_config(self, base: Path) -> dict[str, Any]:
        return json.loads((base / "scheduler" / "scheduler_config.json").read_text())

    def load_pixel_encoder(self, base: Path, device: str) -> AutoencoderEncoder:
        return AutoencoderEncoder(base, device)

    def latent_scaling(self, base: Path) -> LatentScaling:
        vae = json.loads((base / "vae" / "config.json").read_text())
        return LatentScaling(vae.get("shift_factor") or 0.0, vae["scaling_factor"])

    def load_prompt_encoder(self, base: Path, device: str) -> ClipPromptEncoder:
        return ClipPromptEncoder(base, device)

    def load_denoiser(self, base: Path, device: str) -> "nn.Module":
        import torch
        from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

        unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
        return unet.to(device)

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "dict[str, Tensor]") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,) in the scheduler's units, cond["prompt_embeds"] (B, L, D) -> (B, C, h, w)."""
        return denoiser(x_t, timestep, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]

    def target_modules(self, denoiser: "nn.Module", preset: str) -> list[str]:
        """Full names of the layers that take an adapter under `preset`, in the model's order."""
        import torch

        suffixes = TARGETS[preset]
        return [
            name
            for name, module in denoiser.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
            and any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)
        ]

    def load_pipeline(self, base: Path, device: str, dtype: "torch.dtype") -> Any:
        from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

        pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=dtype).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def adapter_file(self, denoiser: "nn.Module", adapter_name: str) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """The adapter's tensors and its metadata under the names that `load_lora_weights` reads.

        PEFT's names (`lora_A`, `lora_B`) throughout: diffusers' converter to the older ones renames attention layers
        only, and its loader, which takes the first key's kind for that of all, then drops the others in silence.
        """
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
        config = denoiser.peft_config[adapter_name].to_dict()  # type: ignore[index, union-attr]
        return (
            {f"unet.{name}": tensor.detach().cpu().contiguous() for name, tensor in layers.items()},
            {f"unet.{name}": value for name, value in config.items()},
        )
