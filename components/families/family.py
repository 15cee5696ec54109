"""What every model family tells the rest of the platform."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a family's pictures and latents, in pixels unless said otherwise."""

    resolution: int  # the side it was trained at
    side_step: int  # bucket sides are multiples of this
    min_side: int  # no bucket side is smaller
    downscale: int  # pixels per latent cell
    channels: int  # of a latent


@dataclass(frozen=True, slots=True)
class LatentScaling:
    """The denoiser sees (latent - shift) * factor."""

    shift: float
    factor: float

    def scale(self, latents: "Tensor") -> "Tensor":
        return (latents - self.shift) * self.factor


class PixelEncoder(Protocol):
    """Pixels to latents: `encode` takes (B, 3, H, W) in [-1, 1], gives the tensors that are cached, each (B, ...)."""

    def encode(self, pixels: "Tensor") -> "dict[str, Tensor]": ...


class PromptEncoder(Protocol):
    """Captions to what the denoiser is conditioned on, each tensor (B, ...)."""

    def encode(self, prompts: Sequence[str]) -> "dict[str, Tensor]": ...

    def count_tokens(self, prompt: str) -> int: ...


class Family(Protocol):
    """One architecture. Folders are in diffusers layout; nothing here knows recipes, caches or runs."""

    name: str
    parts: tuple[str, ...]  # sub-folders a complete base must have
    pixel_parts: tuple[str, ...]  # of these, what latents depend on
    prompt_parts: tuple[str, ...]  # what prompt embeddings depend on
    denoiser_part: str  # the one that is trained

    def geometry(self, base: Path) -> Geometry: ...

    def scheduler_config(self, base: Path) -> dict[str, Any]: ...

    def latent_scaling(self, base: Path) -> LatentScaling: ...

    def load_pixel_encoder(self, base: Path, device: str) -> PixelEncoder: ...

    def load_prompt_encoder(self, base: Path, device: str) -> PromptEncoder: ...

    def load_denoiser(self, base: Path, device: str) -> "nn.Module": ...

    def denoise(
        self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "dict[str, Tensor]"
    ) -> "Tensor": ...

    def target_modules(self, denoiser: "nn.Module", preset: str) -> list[str]: ...

    def load_pipeline(self, base: Path, device: str, dtype: "torch.dtype") -> Any: ...

    def adapter_file(self, denoiser: "nn.Module", adapter_name: str) -> "tuple[dict[str, Tensor], dict[str, Any]]": ...
