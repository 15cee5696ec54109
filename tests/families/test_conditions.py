"""What each family adds to a prompt, and which bases it turns away."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from components.config import BaseModelConfig, load_recipe
from components.curation.manifest import SampleRow
from components.errors import BaseModelError
from components.families.autoencoders import GaussianLatents
from components.families.bases import BaseModel, find_base, resolve_base
from components.families.family import Framing
from components.families.flux import Flux, image_ids, packed, unpacked
from components.families.stable_diffusion_xl import StableDiffusionXL
from components.latents.buckets import Bucket, cover, fit
from components.latents.keys import framing_of, prompt_encoder_key
from flows.demo import RECIPE
from tests.families.members import (
    flux,
    stable_diffusion_3,
    stable_diffusion_3_without_t5,
    stable_diffusion_xl,
)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


def base_of(folder: Path) -> BaseModel:
    return resolve_base(BaseModelConfig(model=str(folder)))


def edit_index(folder: Path, **changes: Any) -> Path:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# SDXL -------------------------------------------------------------------------------------------------------------


def test_time_ids_are_the_stock_pipelines_for_the_same_sizes_and_crop(sdxl: Path):
    pipeline = StableDiffusionXL().load_pipeline(sdxl, "cpu", torch.float32)
    framing = Framing((40, 64), (3, 5), (32, 48))
    stock = pipeline._get_add_time_ids(framing.original, framing.crop, framing.target, torch.float32, 16)
    assert torch.equal(StableDiffusionXL().sample_condition(framing)["time_ids"][None], stock)


@pytest.mark.parametrize(("width", "height"), [(64, 40), (40, 64), (33, 32), (32, 32), (500, 31)])
def test_a_samples_framing_says_what_fitting_it_into_its_bucket_does(width: int, height: int):
    row = SampleRow("", "", "x.png", "", None, "0", "train", width, height, None, None, None, 1)
    placement = cover(width, height, Bucket(32, 32))
    framing = framing_of(row, placement)
    assert framing.original == (height, width) and framing.target == (32, 32)
    image = Image.effect_noise((width, height), 80).convert("RGB")
    (top, left), scale = framing.crop, max(32 / width, 32 / height)
    resized = image.resize((max(32, round(width * scale)), max(32, round(height * scale))), Image.Resampling.LANCZOS)
    assert fit(image, placement).tobytes() == resized.crop((left, top, left + 32, top + 32)).tobytes()


@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_prompt_is_what_the_stock_pipeline_guides_away_from(sdxl: Path, tmp_path: Path, zeros: bool):
    folder = edit_index(shutil.copytree(sdxl, tmp_path / "base"), force_zeros_for_empty_prompt=zeros)
    family = StableDiffusionXL()
    ours = family.null_condition(folder, family.load_prompt_encoder(folder, "cpu").encode([""]))
    with torch.no_grad():
        _, embeds, _, pooled = family.load_pipeline(folder, "cpu", torch.float32).encode_prompt("a sign")
    assert torch.equal(ours["prompt_embeds"], embeds) and torch.equal(ours["pooled_prompt_embeds"], pooled)
    assert bool(embeds.any()) is not zeros


def test_latents_with_a_mean_and_deviation_per_channel_are_undone_as_the_stock_pipeline_does():
    config = {"latents_mean": [0.5, -1.0], "latents_std": [2.0, 4.0], "scaling_factor": 0.5, "shift_factor": None}
    mean = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    scaled = GaussianLatents.of(config)({"mean": mean, "logvar": torch.zeros_like(mean)}, torch.zeros)
    mu, std = (torch.tensor(config[key]).view(1, 2, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(scaled * std / config["scaling_factor"] + mu, mean)


def test_a_posterior_is_sampled_with_its_own_deviation():
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    cached = {"mean": torch.ones_like(noise).half(), "logvar": torch.full_like(noise, 2.0).half()}
    latents = GaussianLatents(0.25, 3.0)(cached, lambda shape: noise)
    torch.testing.assert_close(latents, 3.0 * (1 + torch.e * noise - 0.25))


# FLUX.1 -----------------------------------------------------------------------------------------------------------


def test_packing_and_its_ids_are_the_stock_pipelines_for_a_picture_that_is_no_square():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpacked(tokens, 6, 10), latents)
    cpu = torch.device("cpu")
    assert torch.equal(image_ids(3, 5, cpu), FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32))


def test_dev_and_schnell_do_not_share_embeddings_though_they_share_encoders(tmp_path: Path):
    dev = base_of(flux(tmp_path / "dev"))
    config = shutil.copytree(dev.path, tmp_path / "schnell") / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    schnell = base_of(tmp_path / "schnell")
    parts = dev.architecture.prompt_parts
    assert dev.digest_of(parts) == schnell.digest_of(parts)
    assert prompt_encoder_key(dev) != prompt_encoder_key(schnell)
    assert [Flux().modelspec(base.path) for base in (dev, schnell)] == ["flux-1-dev", "flux-1-schnell"]


def test_dev_is_told_a_guidance_of_1_in_training_and_schnell_none(tmp_path: Path):
    for guided, told in ((True, [1.0, 1.0]), (False, None)):
        base = base_of(flux(tmp_path / str(guided), guided=guided))
        denoiser: Any = base.architecture.load_denoiser(base.path, "cpu")
        seen: list[Any] = []

        def note(_: Any, args: Any, given: dict[str, Any], seen: list[Any] = seen) -> None:
            seen.append(given["guidance"])

        denoiser.register_forward_pre_hook(note, with_kwargs=True)
        cond = base.architecture.load_prompt_encoder(base.path, "cpu").encode(["a sign", ""])
        with torch.no_grad():
            base.architecture.denoise(denoiser, torch.zeros(2, 4, 4, 4), torch.tensor([1.0, 900.0]), cond)
        assert [None if value is None else value.tolist() for value in seen] == [told]


def test_the_recipe_of_schnell_draws_as_it_was_distilled_to():
    recipe = load_recipe(RECIPE.parent / "flux1-schnell.toml")
    assert (recipe.evaluation.num_inference_steps, recipe.evaluation.guidance_scale) == (4, 1.0)
    assert recipe.training.caption_dropout_rate == 0 and not recipe.training.use_dynamic_shifting


# refusals ---------------------------------------------------------------------------------------------------------


def test_the_refiner_is_refused_and_its_base_is_named(sdxl: Path, tmp_path: Path):
    as_published = edit_index(
        shutil.copytree(sdxl, tmp_path / "a"), _class_name="StableDiffusionXLImg2ImgPipeline"
    )
    as_text_to_image = edit_index(shutil.copytree(sdxl, tmp_path / "b"), text_encoder=[None, None])
    for folder in (as_published, as_text_to_image):
        with pytest.raises(BaseModelError, match=r"is the SDXL refiner.*/stable-diffusion-xl-base-1\.0"):
            find_base(BaseModelConfig(model=str(folder)))


def test_a_base_that_says_it_has_t5_must_have_it_and_one_that_goes_without_need_not(tmp_path: Path):
    folder = stable_diffusion_3(tmp_path / "with")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(BaseModelError, match="lacks text_encoder_3/"):
        find_base(BaseModelConfig(model=str(folder)))
    assert "text_encoder_3" not in base_of(stable_diffusion_3_without_t5(tmp_path / "without")).digests


def test_code_that_comes_with_a_base_is_refused_and_not_run(sdxl: Path, tmp_path: Path):
    folder = edit_index(shutil.copytree(sdxl, tmp_path / "base"), unet=["evil", "EvilUNet"])
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BaseModelError, match="brings code of its own for unet, which is never run"):
        resolve_base(BaseModelConfig(model=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_every_index_names_the_classes_that_are_loaded_for_it(sdxl: Path):
    index = json.loads((sdxl / "model_index.json").read_text())
    family = base_of(sdxl).architecture
    assert (index["_class_name"], index["unet"][1]) == (family.pipeline, family.denoiser)
