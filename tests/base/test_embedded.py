"""The weights that ship: they open in the stock pipeline, reconstruct what they never saw, and listen to the prompt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors import safe_open

import components.base
from components.demo.emoji import dominant_color
from components.diffusion.objectives import RectifiedFlow, objective_from_scheduler
from components.training.assembly import MAX_BYTES
from components.training.autoencoder import psnr

BASE = Path(components.base.__path__[0])
EMBEDDED = BASE / "embedded"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline, *prompts: str, seed: int = 0) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    return pipeline(list(prompts), num_inference_steps=15, guidance_scale=4.0, generator=generators).images


def app_icons() -> torch.Tensor:
    """White shapes on coloured rounded squares: what the demo trains on and the autoencoder has not seen."""
    icons = []
    for i, color in enumerate([(222, 52, 62), (247, 140, 32), (34, 160, 92), (38, 112, 230), (128, 66, 190)]):
        image = Image.new("RGB", (256, 256), "white")
        canvas = ImageDraw.Draw(image)
        canvas.rounded_rectangle((12, 12, 244, 244), radius=56, fill=color)
        canvas.regular_polygon((128, 128, 72), n_sides=3 + i, fill="white")
        canvas.ellipse((108, 108, 148, 148), fill=color)
        icons.append(np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(icons)).permute(0, 3, 1, 2) / 127.5 - 1


def test_it_opens_without_arguments_as_the_stock_pipeline_in_single_precision(pipeline: StableDiffusionPipeline):
    assert type(pipeline) is StableDiffusionPipeline
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


def test_an_explicit_precision_gives_the_same_weights(pipeline: StableDiffusionPipeline):
    explicit = DiffusionPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(explicit, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_ships_half_precision_except_for_the_text_encoder_within_its_budget():
    files = list(EMBEDDED.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    for path in files:
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert kinds == ({"F32"} if path.parent.name == "text_encoder" else {"F16"})


def test_its_configs_name_no_folder_of_the_machine_that_trained_it():
    assert not [path for path in EMBEDDED.rglob("*.json") if "_name_or_path" in path.read_text(encoding="utf-8")]


def test_its_scheduler_names_the_objective_it_was_trained_with(pipeline: StableDiffusionPipeline):
    assert isinstance(objective_from_scheduler(pipeline.scheduler.config), RectifiedFlow)
    assert pipeline.scheduler.config["steps_offset"] == 1


def test_the_autoencoder_needs_no_scaling_and_reconstructs_icons_it_never_saw(pipeline: StableDiffusionPipeline):
    icons = app_icons()
    assert pipeline.vae.config["scaling_factor"] == 1.0
    assert psnr(pipeline.vae, icons) > 24
    with torch.no_grad():
        latents = pipeline.vae.encode(icons).latent_dist.mean
    assert latents.shape == (5, 8, 8, 8)
    assert 0.5 < latents.std() < 2


def test_a_seed_and_a_prompt_give_one_picture_of_the_trained_size(pipeline: StableDiffusionPipeline):
    first, again = draw(pipeline, "rocket, noto style")[0], draw(pipeline, "rocket, noto style")[0]
    assert first.size == (64, 64)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != draw(pipeline, "rocket, noto style", seed=1)[0].tobytes()


def test_the_prompt_decides_the_colour(pipeline: StableDiffusionPipeline):
    colors = ("red", "green", "blue", "orange", "purple")
    pictures = draw(pipeline, *(f"{color} heart, twemoji style" for color in colors))
    assert sum(dominant_color(picture) == color for color, picture in zip(colors, pictures, strict=True)) >= 4


def test_no_word_of_a_prompt_is_invisible(pipeline: StableDiffusionPipeline):
    prompts = ["red zebra, app icon style", "red gecko, app icon style", "Ångström", "你好"]
    tokens = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    assert (tokens == pipeline.tokenizer.eos_token_id).sum(dim=1).lt(tokens.shape[1] - 2).all()
    embeds = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    assert not torch.allclose(embeds[0], embeds[1], atol=1e-3)


def test_the_concepts_are_listed_with_their_words_and_styles():
    concepts = json.loads((BASE / "concepts.json").read_text(encoding="utf-8"))
    names = [concept["name"] for concept in concepts]
    assert len(names) == len(set(names)) > 250
    assert {"rocket", "red heart", "blue circle"} <= set(names)
    assert all(set(concept["styles"]) <= {"noto", "twemoji", "fluent"} for concept in concepts)
