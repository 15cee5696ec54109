"""Aesthetic score: linear layers on CLIP's features, as the linearMSE heads of improved-aesthetic-predictor are."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.config import CheckConfig
from components.curation.judges.plugins import Judge, Plugin, clip_source
from components.errors import BadInput
from components.evaluation.model_sources import locate
from components.storage import sha256_of

LAYER = re.compile(r"(?:.*\.)?(\d+)\.weight")
Layers = list[tuple[NDArray[np.float64], NDArray[np.float64]]]   # (out, in) and (out,), in order


def _load(check: CheckConfig, device: str) -> Judge:
    from components.evaluation.embedders import ClipEmbedder

    clip, layers = ClipEmbedder(clip_source("aesthetic", check), device), _layers(_head(check))
    if layers[0][0].shape[1] != clip.dim:
        raise BadInput(f"{check.head}: takes {layers[0][0].shape[1]} features, {check.model} has {clip.dim}; "
                       "give the CLIP that the head was trained on")

    def judge(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        x = clip(images).astype(np.float64)                                # (B, d)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for weight, bias in layers:
            x = x @ weight.T + bias
        return x[:, 0].tolist()

    return judge


def _head(check: CheckConfig) -> Path:
    path = Path(check.head or "").expanduser()
    if not path.is_file():
        raise BadInput(f"curation.checks.aesthetic: head is {check.head!r}; give the .safetensors file of a head, such"
                       " as sac+logos+ava1-l14-linearMSE for CLIP ViT-L/14")
    return path


def _layers(path: Path) -> Layers:
    """The affine layers of a head, by their numbers. Raises BadInput for a pickle, which is never read."""
    from safetensors.numpy import load_file

    if path.suffix != ".safetensors":
        raise BadInput(f"{path}: is no .safetensors file, and pickles are never read; save its tensors as one")
    state = load_file(path)
    names = sorted((int(match[1]), name) for name in state if (match := LAYER.fullmatch(name)))
    layers = [(state[name].astype(np.float64), state[name.removesuffix("weight") + "bias"].astype(np.float64))
              for _, name in names if state[name].ndim == 2]
    if not layers or layers[-1][0].shape[0] != 1:
        raise BadInput(f"{path}: holds no linear layers that end in one score; give a head of linear layers")
    return layers


def _revision(check: CheckConfig) -> str:
    return f"clip {locate(clip_source('aesthetic', check))[2]}, head {sha256_of(_head(check))}"


AESTHETIC = Plugin("aesthetic", "below", "Its aesthetic score is {score:.2f}, below {threshold:g}.",
                   reads_caption=False, revision=_revision, load=_load)
