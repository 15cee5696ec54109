"""Crops and padding as training meets them: the window that a mask, a framing and a cache agree on, and the loss."""

from typing import Any

import pytest
import torch
from PIL import Image

from components.config import Recipe
from components.families.stable_diffusion_xl import StableDiffusionXL
from components.latents import windows
from components.latents.keys import training_sizing
from components.training.samples import CachedSamples, cached_samples
from tests.chain import Chain

PLACES = (0, 20, 64)  # of the subject in a wide picture, in pixels from the left
SMART, PAD = "training.crop=smart", "training.crop=pad"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The chain's pictures, each on a wide grey ground with a mask that is white where it stands."""
    chain = Chain.build(tmp_path_factory.mktemp("chain"))
    for i, path in enumerate(sorted(chain.pictures.glob("*.png"))):
        place = PLACES[i % len(PLACES)], 0
        picture, mask = Image.new("RGB", (96, 32), (150, 150, 150)), Image.new("L", (96, 32), 0)
        picture.paste(Image.open(path), place)
        mask.paste(255, (*place, place[0] + 32, 32))
        picture.save(path)
        mask.save(path.with_name(f"{path.stem}-masklabel.png"))
    recipe = chain.recipe_path.read_text()
    loose = "[curation]\nnear_duplicates = false\n[base]"
    chain.recipe_path.write_text(recipe.replace("[base]", f'masks = "masklabel"\n{loose}', 1))
    return chain


def samples(chain: Chain, recipe: Recipe, *, masked: bool) -> CachedSamples:
    rows = [row for row in chain.curate(recipe) if row.split == "train"]
    return cached_samples(
        chain.bench, rows, chain.base(), training_sizing(chain.base(), recipe.training), masked=masked
    )


def test_latent_mask_and_framing_have_the_window_that_saliency_chose(chain: Chain):
    recipe = chain.recipe(SMART)
    chain.cache(recipe)
    found = samples(chain, recipe, masked=True)
    mask = found.batch(range(len(found.rows))).mask
    assert mask is not None and (mask.mean((1, 2, 3)) > 0.85).all()  # the subject is in the window, and so is its mask
    lefts = [framing.crop[1] for framing in found.framings]
    assert len({round(left / 10) for left in lefts}) == len(PLACES)
    for left, framing in zip(lefts, found.framings, strict=True):
        assert min(abs(left - place) for place in PLACES) <= 4
        said = StableDiffusionXL().sample_condition(framing)["time_ids"].tolist()
        assert said == [32, 96, 0, left, 32, 32]
    centre = chain.recipe()
    chain.cache(centre)
    cut = samples(chain, centre, masked=True).batch(range(len(found.rows))).mask
    assert cut is not None and cut.mean((1, 2, 3)).min() == 0  # in the middle there is nothing of some subjects


def test_windows_are_looked_for_once(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    recipe = chain.recipe(SMART)
    first = chain.cache(recipe)

    def nobody(*given: Any) -> Any:
        raise AssertionError("a window is looked for although it is known")

    monkeypatch.setattr(windows, "salient_corner", nobody)
    again = chain.cache(recipe)
    assert (again.outputs, again.facts["encoded_images"]) == (first.outputs, 0)


def test_padding_is_no_part_of_the_loss_with_masks_and_without(chain: Chain):
    """96x32 in a square of 32: eleven rows of 32 are picture, of latent cells 2.75 of 8."""
    recipe = chain.recipe(PAD)
    chain.cache(recipe)
    plain, latents = samples(chain, recipe, masked=False).batch([0, 1]), torch.zeros(2, 4, 8, 8)
    content = torch.tensor([0, 0, 0.25, 1, 1, 0.5, 0, 0]).view(1, 1, 8, 1).expand(2, 1, 8, 8)
    cells = plain.cells(latents, 0.0)
    assert cells is not None and torch.equal(cells, content)
    masked = samples(chain, recipe, masked=True).batch([0, 1])
    weights = masked.cells(latents, 0.25)
    assert masked.mask is not None and weights is not None
    assert torch.allclose(weights, 0.25 * content + 0.75 * masked.mask)
    assert (weights[content == 0] == 0.0).all() and (masked.mask <= content + 0.05).all()


def test_a_picture_of_the_buckets_shape_is_encoded_once_for_all_kinds_of_crop(tmp_path_factory: pytest.TempPathFactory):
    squares = Chain.build(tmp_path_factory.mktemp("squares"))
    counts = [squares.cache(squares.recipe(*kind)).facts["encoded_images"] for kind in ((), (SMART,), (PAD,))]
    assert counts == [60, 0, 0]


def test_a_training_with_padding_and_several_resolutions_ends(chain: Chain):
    settings = {
        "crop": "pad",
        "resolution": [32, 16],
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "validation_times": 1,
        "validation_items": 2,
        "preview_prompts": 0,
    }
    recipe = chain.recipe(*(f"training.{key}={value}" for key, value in settings.items()))
    chain.cache(recipe)
    events: list[dict[str, Any]] = []
    chain.fine_tune(recipe, work="padded", events=events)
    losses = [event["loss"] for event in events if "loss" in event]
    assert len(losses) == 2 and all(0 < loss < 1 for loss in losses)  # of noise it is about 1 per cell that counts
