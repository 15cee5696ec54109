"""Autoencoders: what is cached of a picture, and how that becomes the latents that a denoiser works on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from components.families.family import Normal, Tensors


class GaussianEncoder:
    """AutoencoderKL and its like: what is cached is the posterior, `mean` and `logvar`, (B, C, H/f, W/f) float32."""

    def __init__(self, base: Path, device: str, autoencoder: str = "AutoencoderKL"):
        self._vae, self._device = _load(base, device, autoencoder), device

    def encode(self, pixels: "Tensor") -> "Tensors":
        import torch

        with torch.inference_mode():
            posterior = self._vae.encode(pixels.to(self._device)).latent_dist
        return {"mean": posterior.mean.cpu(), "logvar": posterior.logvar.cpu()}


class OneFrameEncoder(GaussianEncoder):
    """A video autoencoder's posterior of a single frame, without the time that it gives back."""

    def encode(self, pixels: "Tensor") -> "Tensors":
        return {name: tensor.squeeze(2) for name, tensor in super().encode(pixels.unsqueeze(2)).items()}


class DeterministicEncoder:
    """An autoencoder without a posterior: what is cached is its `latent`, (B, C, H/f, W/f) float32."""

    def __init__(self, base: Path, device: str, autoencoder: str):
        self._vae, self._device = _load(base, device, autoencoder), device

    def encode(self, pixels: "Tensor") -> "Tensors":
        import torch

        with torch.inference_mode():
            return {"latent": self._vae.encode(pixels.to(self._device)).latent.cpu()}


def _load(base: Path, device: str, autoencoder: str) -> Any:
    import diffusers
    import torch

    cls: Any = getattr(diffusers, autoencoder)
    return cls.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True).eval().to(device)


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


@dataclass(frozen=True, slots=True)
class DeterministicLatents:
    """A cached latent * factor."""

    factor: float

    def __call__(self, cached: "Tensors", normal: "Normal") -> "Tensor":
        return cached["latent"].float() * self.factor


def _by_channel(value: float | tuple[float, ...], latents: "Tensor") -> "float | Tensor":
    return latents.new_tensor(value).view(1, -1, 1, 1) if isinstance(value, tuple) else value
