"""Masks as users have them: found, kept with the sample, brought to latent cells, and weighing the loss."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.catalog.encodings import locate
from components.config import CurationConfig, DataConfig, DataSource
from components.curation.manifest import SampleRow, read_manifest
from components.curation.snapshots import curate
from components.diffusion.draws import Draw
from components.diffusion.objectives import objective_from_scheduler
from components.errors import BadInput, RecipeError, Stopped
from components.latents.keys import mask_encoder_key, mask_item, placements, usual_sizing
from components.latents.reading import ShardReader
from components.stages import Bench
from tests.chain import Chain

SIDE = 32
LEFT_HALF = np.tile(np.where(np.arange(SIDE) < SIDE // 2, 255, 0).astype(np.uint8), (SIDE, 1))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain.build(tmp_path_factory.mktemp("chain"))


def pictures(folder: Path, *, alpha: bool = False) -> Path:
    """Two pictures with captions; `alpha`: opaque on the left alone."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(("a", "b")):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        image = Image.fromarray(np.dstack([pixels, LEFT_HALF]) if alpha else pixels)
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"blob {name}")
    return folder


def snapshot(bench: Bench, folder: Path, masks: str | None) -> tuple[list[SampleRow], dict]:
    data = DataConfig(sources=(DataSource(path=str(folder), masks=masks),))
    curation = CurationConfig(near_duplicates=False, min_side=8, test_fraction=0.5)
    product = curate(bench, data, curation, dataset=folder.name, training_size=SIDE)
    return read_manifest(bench.store, product.facts["digest"]), product.facts


def test_the_same_mask_is_found_beside_the_picture_in_a_folder_and_in_the_alpha_channel(chain: Chain, tmp_path: Path):
    beside, apart = pictures(tmp_path / "beside"), pictures(tmp_path / "apart")
    for name in ("a", "b"):
        Image.fromarray(LEFT_HALF).save(beside / f"{name}-masklabel.png")
        (apart / "masks").mkdir(exist_ok=True)
        Image.merge("RGB", [Image.fromarray(LEFT_HALF)] * 3).save(apart / "masks" / f"{name}.webp", lossless=True)
    found = [
        snapshot(chain.bench, beside, "masklabel")[0],
        snapshot(chain.bench, apart, str(apart / "masks"))[0],
        snapshot(chain.bench, pictures(tmp_path / "alpha", alpha=True), "alpha")[0],
    ]
    assert [len(rows) for rows in found] == [2, 2, 2]  # no mask was counted as a picture
    digests = {row.mask for rows in found for row in rows}
    assert len(digests) == 1
    assert np.array_equal(np.asarray(Image.open(chain.bench.store.path(str(digests.pop())))), LEFT_HALF)


def test_without_masks_the_manifest_is_what_it_was_and_a_mask_makes_another_snapshot(chain: Chain, tmp_path: Path):
    folder = pictures(tmp_path / "set")
    plain, facts = snapshot(chain.bench, folder, None)
    for name in ("a", "b"):
        Image.fromarray(LEFT_HALF).save(folder / f"{name}-masklabel.png")
    again, ignored = snapshot(chain.bench, folder, None)
    masked, other = snapshot(chain.bench, folder, "masklabel")
    assert facts["digest"] == ignored["digest"] != other["digest"]
    assert plain == again == [replace(row, mask=None) for row in masked]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (16, 32), 255), "it is 16x32, its picture 32x32"),
        (Image.new("L", (32, 32), 0), "black all over"),
    ],
)
def test_a_mask_that_cannot_be_used_rejects_its_picture_with_the_reason(
    chain: Chain, tmp_path: Path, mask: Image.Image, said: str
):
    folder = pictures(tmp_path / "set")
    mask.save(folder / "a-masklabel.png")
    rows, facts = snapshot(chain.bench, folder, "masklabel")
    assert [row.file_name for row in rows] == ["b.png"]
    assert facts["rejects"] == {"mask": 1}
    (folder / "b.txt").unlink()
    (folder / "b.png").unlink()
    with pytest.raises(BadInput, match="1 mask"):
        snapshot(chain.bench, folder, "masklabel")


def test_masks_that_are_not_there_are_said_in_one_line(chain: Chain, tmp_path: Path):
    folder = pictures(tmp_path / "set")
    for masks, said in (
        ("masklabel", "none of its 2 pictures has a mask"),
        (str(tmp_path / "no"), "no such folder of"),
    ):
        with pytest.raises(BadInput, match=said):
            snapshot(chain.bench, folder, masks)
    with pytest.raises(BadInput, match="masked_loss is set, but no training picture has a mask"):
        chain.cache(chain.recipe())
        chain.fine_tune(chain.recipe("training.masked_loss=true"))
    with pytest.raises(RecipeError, match=r"unmasked_weight is 0\.5, but masked_loss is False"):
        chain.recipe("training.unmasked_weight=0.5")


def masked_chain(folder: Path, level: int) -> Chain:
    """The chain's pictures, each with a mask whose right half is `level`."""
    chain = Chain.build(folder)
    mask = Image.fromarray(np.maximum(LEFT_HALF, np.uint8(level)))
    for picture in sorted(chain.pictures.glob("*.png")):
        mask.save(picture.with_name(f"{picture.stem}-masklabel.png"))
    recipe = chain.recipe_path.read_text()
    chain.recipe_path.write_text(recipe.replace("[base]", 'masks = "masklabel"\n[base]'))
    chain.cache(chain.recipe())
    return chain


TINY = (
    "training.max_train_steps=3",
    "training.checkpointing_steps=3",
    "training.train_batch_size=2",
    "training.validation_items=2",
    "training.validation_times=1",
    "training.preview_prompts=0",
    "training.learning_rate=1e-2",
)


def test_white_masks_train_to_the_bytes_of_no_masks_and_others_do_not(tmp_path: Path):
    white = masked_chain(tmp_path / "white", 255)
    plain = white.fine_tune(white.recipe(*TINY)).outputs
    assert white.fine_tune(white.recipe(*TINY, "training.masked_loss=true")).outputs == plain
    half = masked_chain(tmp_path / "half", 0)
    assert half.fine_tune(half.recipe(*TINY)).outputs == plain
    masked = half.recipe(*TINY, "training.masked_loss=true", "training.unmasked_weight=0.25")
    unbroken = half.fine_tune(masked).outputs
    assert unbroken != plain
    with pytest.raises(Stopped):
        half.fine_tune(masked, stop_after=1)
    assert half.fine_tune(masked).outputs == unbroken


def test_a_cells_weight_is_the_mean_of_its_pixels(tmp_path: Path):
    chain = masked_chain(tmp_path / "grey", 51)
    row = chain.curate(chain.recipe())[0]
    item = mask_item(row, *placements(row, usual_sizing(chain.base(), SIDE)))
    assert item is not None
    reader = ShardReader(chain.bench.store, locate(chain.bench.catalog, mask_encoder_key(chain.base()), [item.key]))
    cells = reader([item.key])["mask"]
    assert cells.shape == (1, 1, 8, 8)
    assert torch.allclose(cells[0, 0, :, :4], torch.ones(8, 4))
    assert torch.allclose(cells[0, 0, :, 4:], torch.full((8, 4), 0.2))


def test_the_weighted_error_is_the_mean_over_cells_of_weight_times_square(chain: Chain):
    objective = objective_from_scheduler(json.loads((chain.base_path / "scheduler/scheduler_config.json").read_text()))
    generator = torch.Generator().manual_seed(0)
    latents, cells = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, 1, 8, 8, generator=generator)
    draw = Draw(0, 0, ("a", "b"))
    squares = []

    def denoiser(x_t, timestep, cond):
        squares.append((x_t - draw.normal(latents.shape)).square())
        return x_t

    found = objective.per_sample(denoiser, latents, None, draw, cells)
    assert torch.allclose(found, (squares[0] * cells).sum((1, 2, 3)) / (4 * 8 * 8))
    whole = objective.per_sample(denoiser, latents, None, draw, torch.ones_like(cells))
    assert torch.equal(whole, objective.per_sample(denoiser, latents, None, draw))
