"""Autoencoders: what is cached of a picture, and how that becomes the latents that a denoiser works on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from components.families.family import Normal, PixelEncoder, Tensors

AGREEMENT = 0.02  # of the standard deviation of what is cached
CPU_PIXELS = 2**17  # encoded at once on a CPU: kernels are read once for several pictures, and caches hold the rest


class GaussianEncoder:
    """AutoencoderKL and its like: what is cached is the posterior, `mean` and `logvar`, (B, C, H/f, W/f) float32."""

    def __init__(self, base: Path, device: str, autoencoder: str = "AutoencoderKL"):
        self.vae, self._device = _load(base, device, autoencoder), device

    def encode(self, pixels: "Tensor") -> "Tensors":
        import torch

        with torch.inference_mode():
            posteriors = [self.vae.encode(some).latent_dist for some in _passes(pixels, self._device)]
        return {name: torch.cat([getattr(one, name).cpu() for one in posteriors]) for name in ("mean", "logvar")}


class OneFrameEncoder(GaussianEncoder):
    """A video autoencoder's posterior of a single frame, without the time that it gives back."""

    def encode(self, pixels: "Tensor") -> "Tensors":
        return {name: tensor.squeeze(2) for name, tensor in super().encode(pixels.unsqueeze(2)).items()}


class DeterministicEncoder:
    """An autoencoder without a posterior: what is cached is its `latent`, (B, C, H/f, W/f) float32."""

    def __init__(self, base: Path, device: str, autoencoder: str):
        self.vae, self._device = _load(base, device, autoencoder), device

    def encode(self, pixels: "Tensor") -> "Tensors":
        import torch

        with torch.inference_mode():
            latents = [self.vae.encode(some).latent.cpu() for some in _passes(pixels, self._device)]
        return {"latent": torch.cat(latents)}


def _passes(pixels: "Tensor", device: str) -> "Iterator[Tensor]":
    """The pictures (B, ...) as they go through an encoder: all at once, or on a CPU a power of two at a time.

    Full batches are then cut into equal parts, so that a picture's bits do not depend on its place in one.
    """
    at_once = len(pixels)
    if device == "cpu":
        at_once = 1 << max(0, (CPU_PIXELS // (pixels.shape[-1] * pixels.shape[-2])).bit_length() - 1)
    return (some.to(device) for some in pixels.split(at_once))


class HalfEncoder:
    """An encoder's convolutions and products in bfloat16 and channels_last, which is what a GPU is fast at."""

    def __init__(self, encoder: Any, device: str):
        from components.tensors import lay_channels_last

        self._encoder, self._device = encoder, device
        lay_channels_last(encoder.vae)

    def encode(self, pixels: "Tensor") -> "Tensors":
        import torch

        with torch.autocast(self._device.partition(":")[0], torch.bfloat16):
            return {name: tensor.float() for name, tensor in self._encoder.encode(pixels).items()}


def half_where_it_agrees(encoder: Any, side: int, device: str) -> "PixelEncoder":
    """The encoder in bfloat16, or as it is where that changes what it gives of two pictures of noise beyond AGREEMENT.

    The pictures are always the same, so that a base gives one answer on one kind of device.
    """
    import torch

    noise = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, side // 8, side // 8, generator=noise) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)
    exact = encoder.encode(pixels)
    half = HalfEncoder(encoder, device)
    rounded = half.encode(pixels)
    if all(_error(rounded[name], tensor) <= AGREEMENT for name, tensor in exact.items()):
        return half
    encoder.vae.to(memory_format=torch.contiguous_format)
    return encoder


def _error(rounded: "Tensor", exact: "Tensor") -> float:
    """Root mean square of the difference over the standard deviation; not a number where one of them is none."""
    return float((rounded - exact).square().mean().sqrt() / exact.std())


def _load(base: Path, device: str, autoencoder: str) -> Any:
    import diffusers
    import torch

    cls: Any = getattr(diffusers, autoencoder)
    vae = cls.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True)
    return vae.eval().requires_grad_(False).to(device)


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
