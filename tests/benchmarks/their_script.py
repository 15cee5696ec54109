"""Runs diffusers' `train_text_to_image_lora.py` as it is, in a process of its own, and notes what each step cost.

    python -m tests.benchmarks.their_script request.json result.json

Three modes. "plain" only notes CPU time and loss after each step. "record" also writes down every random number that
the script draws, the order of its samples and the adapter it starts with. "cached" gives its loop, in the place of
pictures and captions, their latents and embeddings, and to its two encoders nothing to do: what is left is its loop.

The script imports torchvision, which the CPU build of torch goes without; of it the script uses the seven names below,
on pictures that have the training size already. What they make of a picture is made once and remembered, so that from
the second epoch on they cost the script a look into a dictionary.
"""

import enum
import functools
import runpy
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import datasets
import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.autoencoders import vae as posteriors
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.benchmarks.paired import Steps, answer

# torchvision.transforms ---------------------------------------------------------------------------------------------


class InterpolationMode(enum.Enum):
    LANCZOS = Image.Resampling.LANCZOS


class Resize:
    def __init__(self, size: int, interpolation: InterpolationMode):
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self.size / min(image.size)
        return image.resize((round(image.width * scale), round(image.height * scale)), self.interpolation.value)


class CenterCrop:
    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


class Lambda:
    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, value: Any) -> Any:
        return self.function(value)


class ToTensor:
    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


class Normalize:
    def __init__(self, mean: list[float], std: list[float]):
        self.mean, self.std = (torch.tensor(value).view(-1, 1, 1) for value in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class Compose:
    """Remembers what it made of a picture."""

    def __init__(self, transforms: list[Callable[[Any], Any]]):
        self.transforms, self.made = transforms, {}

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = image.tobytes()
        if pixels not in self.made:
            self.made[pixels] = functools.reduce(lambda value, transform: transform(value), self.transforms, image)
        return self.made[pixels]


def lend_torchvision() -> None:
    """After the libraries have been imported, since they ask what is installed and would want more of it."""
    transformers.utils.is_torchvision_available()
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    for part in (InterpolationMode, Resize, CenterCrop, Lambda, ToTensor, Normalize, Compose):
        setattr(transforms, part.__name__, part)
    package.__dict__["transforms"] = transforms
    for module in (package, transforms):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


# looking on -----------------------------------------------------------------------------------------------------------


def look_on(steps: Steps) -> None:
    """At the start of the loop and after each step; no tracker is installed that would miss the calls."""
    accelerate.Accelerator.init_trackers = lambda *_, **__: steps.begin()
    accelerate.Accelerator.log = lambda _, values, **__: steps.note(values["train_loss"])


def file_names(dataset: datasets.Dataset) -> list[str]:
    paths = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    return [Path(entry["path"]).name for entry in paths]


class Watched:
    """A dataset that writes down the file names of each batch it is asked for."""

    def __init__(self, dataset: datasets.Dataset, names: list[str], asked: list[list[str]]):
        self.dataset, self.names, self.asked = dataset, names, asked

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        self.asked.append([self.names[row] for row in rows])
        return self.dataset.__getitems__(rows)


def record(draws: dict[str, list[Tensor]], order: list[list[str]], adapter: dict[str, Tensor]) -> None:
    """Write down the script's random numbers and batches as they come, and hold on to its adapter."""
    randn_tensor, randn_like, randint = posteriors.randn_tensor, torch.randn_like, torch.randint
    with_transform, prepare = datasets.Dataset.with_transform, accelerate.Accelerator.prepare

    def kept(name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*args: Any, **options: Any) -> Tensor:
            draws[name].append(value := draw(*args, **options))
            return value

        return drawn

    def prepared(self: accelerate.Accelerator, unet: torch.nn.Module, *rest: Any) -> Any:
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad:
                adapter.update({f"start/{name}": parameter.detach().clone(), f"end/{name}": parameter.detach()})
        return prepare(self, unet, *rest)

    posteriors.randn_tensor = kept("posterior", randn_tensor)
    torch.randn_like, torch.randint = kept("noise", randn_like), kept("time", randint)
    datasets.Dataset.with_transform = lambda dataset, transform: Watched(
        with_transform(dataset, transform), file_names(dataset), order
    )
    accelerate.Accelerator.prepare = prepared


def lend_latents(path: Path) -> None:
    """Rows of (moments, embedding) for a dataset, an autoencoder that takes the one, a text encoder the other.

    The autoencoder hands on channels last, as its convolutions would: random numbers are drawn in memory's order.
    """
    cached = load_file(path)

    def rows(dataset: datasets.Dataset, transform: object) -> list[dict[str, Tensor]]:
        return [
            {"pixel_values": cached[f"{name}/moments"], "input_ids": cached[f"{name}/prompt_embeds"]}
            for name in file_names(dataset)
        ]

    def encode(_: diffusers.AutoencoderKL, moments: Tensor) -> AutoencoderKLOutput:
        moments = moments.contiguous(memory_format=torch.channels_last)
        return AutoencoderKLOutput(latent_dist=posteriors.DiagonalGaussianDistribution(moments))

    datasets.Dataset.with_transform, diffusers.AutoencoderKL.encode = rows, encode
    transformers.CLIPTextModel.forward = lambda _, embeds, return_dict: (embeds,)


def run(request: dict[str, Any]) -> dict[str, Any]:
    steps, order = Steps(), []
    draws: dict[str, list[Tensor]] = {"posterior": [], "noise": [], "time": []}
    adapter: dict[str, Tensor] = {}
    if request["mode"] == "record":
        record(draws, order, adapter)
    elif request["mode"] == "cached":
        lend_latents(Path(request["latents"]))
    look_on(steps)
    lend_torchvision()
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")
    if request["mode"] == "record":
        stacked = {name: torch.stack(values).contiguous() for name, values in draws.items()}
        save_file(stacked | adapter, request["recording"])
    return steps.facts() | {"order": order}


if __name__ == "__main__":
    answer(run)
