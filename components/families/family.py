"""What every model family tells the rest of the platform."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from components.families.placement import place_pipeline

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from components.families.text import ClipPrompts

    Tensors = dict[str, Tensor]
    Normal = Callable[[Sequence[int]], Tensor]  # shape (B, ...) -> standard normal numbers

MULTISTEP = ("euler", "dpmsolver++", "sde-dpmsolver++")  # samplers that are one class of diffusers on a flow's path
BUCKET_STEP = 64  # pixels; what trainers of full-size bases agree on
MIN_SIDE = 256  # pixels; bases trained below this have no room for buckets and take squares only


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a family's pictures and latents, in pixels unless said otherwise."""

    resolution: int  # the side it was trained at
    side_step: int  # bucket sides are multiples of this
    min_side: int  # no bucket side is smaller
    downscale: int  # pixels per latent cell
    channels: int  # of a latent
    patch: int = 2  # latent cells on a side of one token: what a dynamic shift counts

    @classmethod
    def of(cls, resolution: int, finest_step: int, downscale: int, channels: int, patch: int = 2) -> "Geometry":
        """With the buckets that trainers agree on, or, for a base too small for them, squares on its finest grid."""
        small = resolution < MIN_SIDE
        step, side = (finest_step, resolution) if small else (BUCKET_STEP, MIN_SIDE)
        return cls(resolution, step, side, downscale, channels, patch)


@dataclass(frozen=True, slots=True)
class Framing:
    """How a picture came to its training size; each (vertical, horizontal) in pixels."""

    original: tuple[int, int]  # its height and width as it was
    crop: tuple[int, int]  # the top left corner that was kept, in the picture as it was resized to cover the bucket
    target: tuple[int, int]  # height and width of the bucket


class PixelEncoder(Protocol):
    """Pixels to what is cached of them: `encode` takes (B, 3, H, W) in [-1, 1], each tensor it gives is (B, ...)."""

    def encode(self, pixels: "Tensor") -> "Tensors": ...


class PromptEncoder(Protocol):
    """Captions to what the denoiser is conditioned on, each tensor (B, ...).

    Captions are always padded to one length, so that a caption's bits do not depend on its neighbours. Where the
    denoiser is told which positions are text, `<name>_mask` (B, L) bool says so of `<name>` (B, L, ...), with the text
    first: only that is cached.
    """

    def encode(self, prompts: Sequence[str]) -> "Tensors": ...


class ScaledLatents(Protocol):
    """Rows of the cache to latents (B, C, h, w) float32 as the denoiser sees data; `normal` where there is chance."""

    def __call__(self, cached: "Tensors", normal: "Normal") -> "Tensor": ...


class Family(ABC):
    """One architecture. Folders are in diffusers layout; nothing here knows recipes, caches or runs.

    What all of diffusers' layout has in common is written here once; a family says what is its own.
    """

    name: str
    pipeline: str  # the diffusers class that model_index.json names
    denoiser: str  # the diffusers class that is trained
    denoiser_part: str = "transformer"  # its folder, and its prefix in an adapter file
    parts: tuple[str, ...]  # sub-folders a complete base must have
    optional_parts: tuple[str, ...] = ()  # and those that model_index.json may say it goes without
    pixel_parts: tuple[str, ...] = ("vae",)  # of these, what latents depend on
    prompt_parts: tuple[str, ...]  # what prompt embeddings depend on
    clip_parts: tuple[str, ...] = ()  # text encoders that can be trained with the denoiser
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of frozen weights on a GPU and of cached embeddings
    targets: Mapping[str, tuple[str, ...]]  # preset -> patterns of the ends of layers' names

    @abstractmethod
    def geometry(self, base: Path) -> Geometry: ...

    @abstractmethod
    def modelspec(self, base: Path) -> str:
        """The architecture's name in ModelSpec 1.0.1, without "/lora"."""

    @abstractmethod
    def load_prompt_encoder(self, base: Path, device: str) -> PromptEncoder: ...

    @abstractmethod
    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,) in the scheduler's units -> the prediction that the scheduler names.

        `cond` is what `load_prompt_encoder` and `sample_condition` give, batched.
        """

    def load_clip_prompts(self, base: Path, device: str, dtype: "torch.dtype") -> "ClipPrompts":
        """The encoders of `clip_parts`, whose embeddings of prompts are tensor for tensor those that are cached."""
        raise NotImplementedError(f"{self.name} has no text encoders that can be trained")

    def refusal(self, index: Mapping[str, Any]) -> str:
        """Why a base with this model_index.json cannot be trained though its class can, or ''."""
        return ""

    def scheduler_config(self, base: Path) -> dict[str, Any]:
        return read_config(base, "scheduler", "scheduler_config.json")

    def load_pixel_encoder(self, base: Path, device: str) -> PixelEncoder:
        """In float32 always: half precision makes some autoencoders overflow."""
        from components.families.autoencoders import GaussianEncoder

        return GaussianEncoder(base, device)

    def scaled_latents(self, base: Path) -> ScaledLatents:
        from components.families.autoencoders import GaussianLatents

        return GaussianLatents.of(read_config(base, "vae"))

    def prompt_settings(self, base: Path) -> dict[str, Any]:
        """What prompt embeddings depend on besides the weights of `prompt_parts`, such as the text's length."""
        return {}

    def null_condition(self, base: Path, empty: "Tensors") -> "Tensors":
        """What guidance and caption dropout put in a prompt's place, given the embedding of the empty prompt."""
        return empty

    def sample_condition(self, framing: Framing) -> "Tensors":
        """What the denoiser is told of a sample besides its prompt; tensors without a batch dimension."""
        return {}

    def dtype(self, device: str) -> "torch.dtype":
        """In which weights that are not trained are loaded."""
        import torch

        return torch.bfloat16 if device != "cpu" and self.precision == "bfloat16" else torch.float32

    def load_denoiser(self, base: Path, device: str, dtype: "torch.dtype | None" = None) -> "nn.Module":
        """With frozen weights in `dtype`, by default the family's own on that device."""
        import diffusers

        cls: Any = getattr(diffusers, self.denoiser)
        return cls.from_pretrained(
            base, subfolder=self.denoiser_part, torch_dtype=dtype or self.dtype(device), use_safetensors=True
        ).to(device)

    def load_pipeline(
        self, base: Path, device: str, dtype: "torch.dtype", denoiser: "nn.Module | None" = None, **parts: Any
    ) -> Any:
        """The stock pipeline; with `denoiser` and `parts` in the place of the base's own, which are not loaded then."""
        import diffusers

        cls: Any = getattr(diffusers, self.pipeline)
        index = read_config(base, ".", "model_index.json")
        given: dict[str, Any] = {part: None for part in self.optional_parts if not has_part(index, part)}
        given |= parts if denoiser is None else parts | {self.denoiser_part: denoiser}
        pipeline = cls.from_pretrained(base, torch_dtype=dtype, use_safetensors=True, **given)
        place_pipeline(pipeline, self.denoiser_part, device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generation_options(self, pipeline: Any, guidance_scale: float, batch_size: int) -> dict[str, Any]:
        """How the stock pipeline is asked for a batch of that guidance (1 is none), besides what every one is asked."""
        return {"guidance_scale": guidance_scale}

    def unfit_samplers(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        """Samplers by name that suit a base with this scheduler config, but not the stock pipeline: most flow
        pipelines hand the scheduler noise levels or a shift of their own, which not every class takes."""
        return ()

    def target_modules(self, denoiser: "nn.Module", preset: str) -> list[str]:
        """Full names of the layers that take an adapter under `preset`, in the model's order."""
        import torch

        wanted = re.compile(rf"(?:.*\.)?(?:{'|'.join(self.targets[preset])})")
        return [
            name
            for name, module in denoiser.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and wanted.fullmatch(name)
        ]

    def adapter_file(self, model: Any, adapter_name: str, part: str | None = None) -> "tuple[Tensors, dict[str, Any]]":
        """The adapter's tensors and its metadata under the names that `load_lora_weights` reads.

        `part` is what the pipeline calls the model, by default the denoiser.

        PEFT's names (`lora_A`, `lora_B`) throughout: diffusers' converter to the older ones renames attention layers
        only, and its loader, which takes the first key's kind for that of all, then drops the others in silence.
        """
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        config = model.peft_config[adapter_name].to_dict() | {"base_model_name_or_path": None}  # which may be a path
        prefix = part or self.denoiser_part
        return (
            {f"{prefix}.{name}": tensor.detach().cpu().contiguous() for name, tensor in layers.items()},
            {f"{prefix}.{name}": value for name, value in config.items()},
        )


def has_part(index: Mapping[str, Any], part: str) -> bool:
    """Whether model_index.json names a class for `part`: a base that goes without says [null, null]."""
    return bool((index.get(part) or [None])[0])


def read_config(base: Path, part: str, name: str = "config.json") -> dict[str, Any]:
    return json.loads((base / part / name).read_text(encoding="utf-8"))
