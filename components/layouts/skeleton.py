"""The layers of a base that an adapter may touch: names and shapes from file headers, weights only when asked for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.layouts.names import ARCHITECTURES, Architecture, Shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from components.families.bases import BaseModel

SD2_WIDTH = 1024  # of the prompt embeddings of Stable Diffusion 2.x; 1.x has 768


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Layers by part and path with their weights' shapes, and how to get a weight."""

    name: str  # of the base, for messages
    pipeline: str  # key of ARCHITECTURES
    shapes: Mapping[str, Shapes]  # part -> path -> (out, in, ...)
    weight: Callable[[str, str], "Tensor"]  # (part, path) -> (out, in, ...)

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.pipeline]

    @property
    def is_sd2(self) -> bool:
        """Stable Diffusion 2.x, by the width of its prompt embeddings."""
        unet = self.shapes.get("unet", {})
        widths = {shape[1] for path, shape in unet.items() if path.endswith("attn2.to_k")}
        return self.pipeline == "StableDiffusionPipeline" and widths == {SD2_WIDTH}

    def own_path(self, part: str, path: str) -> str:
        """A layer's path as this base has it: the `text_model` around CLIP comes and goes with transformers."""
        other = path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}"
        shapes = self.shapes.get(part, {})
        return other if path not in shapes and other in shapes else path

    def kohya_module(self, part: str, path: str) -> str:
        """What kohya's files call a layer of a text encoder."""
        return f"{self.architecture.encoders[part].kohya}_{encoder_module(path).replace('.', '_')}"

    def comfyui_module(self, part: str, path: str) -> str:
        """What ComfyUI calls it; OpenCLIP, the encoder of Stable Diffusion 2.x, has another place there."""
        encoder = self.architecture.encoders[part].comfyui
        return (
            f"text_encoders.{encoder.replace('clip_l', 'clip_h') if self.is_sd2 else encoder}.{encoder_module(path)}"
        )


def encoder_module(path: str) -> str:
    """Other programs' CLIP has a text_model around its encoder, which transformers has dropped; T5 has none."""
    return path if path.startswith(("text_model.", "encoder.block.", "text_projection")) else f"text_model.{path}"


def skeleton_of(base: "BaseModel") -> Skeleton:
    """The layers of a base on disk, read from its safetensors headers."""
    found = ARCHITECTURES[base.family]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    files: dict[tuple[str, str], Path] = {}
    for part in (found.denoiser, *found.encoders):
        for file in sorted((base.path / part).glob("*.safetensors")):
            for key, entry in _header(file).items():
                path, dot, leaf = key.rpartition(".")
                if dot and leaf == "weight" and len(entry["shape"]) in (2, 4):
                    shapes.setdefault(part, {})[path] = tuple(entry["shape"])
                    files[part, path] = file

    def weight(part: str, path: str) -> "Tensor":
        from safetensors import safe_open

        with safe_open(files[part, path], "pt") as file:
            return file.get_tensor(f"{path}.weight")

    return Skeleton(base.name, base.family, shapes, weight)


def skeleton_of_modules(name: str, pipeline: str, parts: "Mapping[str, nn.Module]") -> Skeleton:
    """The same of models in memory that carry no adapter."""
    weights = {
        part: {
            key.removesuffix(".weight"): tensor
            for key, tensor in module.state_dict().items()
            if key.endswith(".weight") and tensor.dim() in (2, 4)
        }
        for part, module in parts.items()
    }
    shapes = {part: {path: tuple(tensor.shape) for path, tensor in held.items()} for part, held in weights.items()}
    return Skeleton(name, pipeline, shapes, lambda part, path: weights[part][path])


def _header(file: Path) -> dict[str, dict]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return header
