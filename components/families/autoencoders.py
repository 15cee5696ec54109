"""Autoencoders: what is cached of a picture, and how that becomes the latents that a denoiser works on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from components.families.family import Normal, Tensors


class GaussianEncoder:
    """AutoencoderKL: what is cached is its posterior, `mean` and `logvar`, both (B, C, H/f, W/f) float32."""

    def __init__(self, base: Path, device: str):
        import torch
        from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

        self._vae: Any = AutoencoderKL.from_pretrained(
            base, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True
        ).eval()
        self._vae.to(device)
        self._device = device

    def encode(self, pixels: "Tensor") -> "Tensors":
        import torch

        with torch.inference_mode():
            posterior = self._vae.encode(pixels.to(self._device)).latent_dist
        return {"mean": posterior.mean.cpu(), "logvar": posterior.logvar.cpu()}


@dataclass(frozen=True, slots=True)
class GaussianLatents:
    """(a sample of the posterior - shift) * factor; both are one number, or one per channel."""

    shift: float | tuple[float, ...]
    factor: float | tuple[float, ...]

    @classmethod
    def of(cls, vae: Mapping[str, Any]) -> "GaussianLatents":
        """By an autoencoder's config: latents_mean and latents_std, where it has them, else shift_factor."""
        mean, std, factor = vae.get("latents_mean"), vae.get("latents_std"), vae["scaling_factor"]
        if mean is not None and std is not None:
            return cls(tuple(mean), tuple(factor / value for value in std))
        return cls(vae.get("shift_factor") or 0.0, factor)

    def __call__(self, cached: "Tensors", normal: "Normal") -> "Tensor":
        mean, logvar = cached["mean"].float(), cached["logvar"].float()
        latents = mean + (0.5 * logvar).exp() * normal(mean.shape)
        return (latents - _by_channel(self.shift, latents)) * _by_channel(self.factor, latents)


def _by_channel(value: float | tuple[float, ...], latents: "Tensor") -> "float | Tensor":
    return latents.new_tensor(value).view(1, -1, 1, 1) if isinstance(value, tuple) else value
