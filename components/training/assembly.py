"""From training checkpoints to a diffusers pipeline folder that `DiffusionPipeline.from_pretrained` opens as it is."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from components.diffusion.samplers import sampler_from_scheduler
from components.errors import DamagedArtifact
from components.training.denoiser import TextToLatents
from components.training.pictures import Picture

MAX_BYTES = 48 * 2**20  # of safetensors in the folder


def assemble_pipeline(
    model: TextToLatents, vae: AutoencoderKL, folder: Path, scheduler: Mapping[str, Any]
) -> Path:
    """Write the pipeline beside `folder`, then swap it in: U-Net and VAE as fp16, the text encoder as fp32.

    transformers opens a text encoder in the precision it was saved in, diffusers opens its models in fp32: a text
    encoder saved as fp16 would meet an fp32 U-Net. Returns `folder`. Raises: DamagedArtifact above MAX_BYTES.
    """
    partial, previous = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.previous")
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=sampler_from_scheduler("auto", scheduler),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(partial)
    for part, network in (("unet", model.unet), ("vae", vae)):
        half = type(network).from_pretrained(partial / part, torch_dtype=torch.float16)
        half.save_pretrained(partial / part)
    for path in partial.rglob("*.json"):
        _forget_paths(path)
    size = sum(path.stat().st_size for path in partial.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise DamagedArtifact(f"{partial}: {size} bytes of safetensors, at most {MAX_BYTES} may ship; train smaller")
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def _forget_paths(path: Path) -> None:
    """Drop the folder that diffusers notes in a config it has loaded: it means nothing on another machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_concepts(pictures: Sequence[Picture], path: Path) -> None:
    """The trained concepts as JSON: name, other words of the captions, styles, and colour words seen with it."""
    concepts: dict[str, dict] = {}
    for picture in pictures:
        concept = concepts.setdefault(picture.name, {"name": picture.name, "words": [], "styles": [], "colors": []})
        concept["words"] += [word for word in picture.synonyms if word not in concept["words"]]
        concept["styles"].append(picture.style)
        if picture.color and picture.color not in concept["colors"]:
            concept["colors"].append(picture.color)
    path.write_text(json.dumps(list(concepts.values()), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
