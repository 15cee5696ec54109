"""The plan: counted by hand on a folder of known sizes, quick, and without torch."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.config import CurationConfig, DataConfig, DataSource, Recipe, TrainingConfig
from components.curation.snapshots import curate
from components.curation.sources import Item
from components.latents.crops import CELL, GAP, LINE, LINES, PADDING, TITLE
from components.stages import Bench
from flows import placing, plans
from tests.curation.folders import picture

ROOT = Path(__file__).parents[2]


def recipe(folder: Path, *, training: dict[str, Any] | None = None, **curation: Any) -> Recipe:
    return Recipe(
        name="blobs",
        data=DataConfig(sources=(DataSource(path=str(folder)),)),
        curation=CurationConfig.model_validate(curation),
        training=TrainingConfig.model_validate({"train_batch_size": 4, "max_train_steps": 100} | (training or {})),
    )


def keep(folder: Path, name: str, size: tuple[int, int], caption: str = "a picture", **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture(len(name) + size[0], side=max(size)).crop((0, 0, *size)).save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text(caption)


def test_each_bucket_has_its_share_of_batches_and_steps(bench: Bench, tmp_path: Path):
    for i in range(6):
        keep(tmp_path / "3_cats", f"{i}.png", (64, 64))
    keep(tmp_path / "1_dogs", "small.png", (48, 48))
    keep(tmp_path / "1_dogs", "wide.png", (128, 64))
    told: list[dict[str, Any]] = []
    plan = plans.plan(bench, recipe(tmp_path, test_fraction=0.1), told.append)
    assert told[-1] == {"event": "progress", "stage": "scanning", "done": 8, "total": 8}
    (bucket,) = plan["buckets"]
    assert (bucket["width"], bucket["height"], bucket["pictures"], bucket["repeats"]) == (64, 64, 8, 20)
    assert bucket["samples"] == pytest.approx(18) and (bucket["batches"], bucket["steps"]) == (5, 100)
    assert bucket["cropped"] == {"mean": pytest.approx(0.5 / 8), "worst": pytest.approx(0.5)}
    assert bucket["upscaled"] == 1 and plan["enlarged"] == {
        "pictures": 1,
        "worst": [{"file_name": "1_dogs/small.png", "scale": pytest.approx(64 / 48)}],
    }
    assert plan["epochs"] == pytest.approx(100 * 4 / 18)


def test_several_buckets_share_the_steps_by_their_samples(bench: Bench, tmp_path: Path):
    """At 96 px the embedded base has other shapes than the square; of five places in a batch one picture takes all."""
    for i in range(3):
        keep(tmp_path, f"square-{i}.png", (96, 96))
    keep(tmp_path, "wide.png", (128, 64))
    plan = plans.plan(bench, recipe(tmp_path, test_fraction=0, training={"resolution": 96, "train_batch_size": 5}))
    found = [(b["width"], b["height"], b["pictures"], b["batches"], b["steps"]) for b in plan["buckets"]]
    assert found == [(96, 96, 3, 1, 75), (128, 64, 1, 1, 25)]
    assert [b["repeated"] for b in plan["buckets"]] == [2, 4]


def test_every_resolution_has_its_buckets_and_small_pictures_are_told(bench: Bench, tmp_path: Path):
    keep(tmp_path, "large.png", (128, 128))
    keep(tmp_path, "small.png", (80, 80))
    settings = {"resolution": [96, 64], "train_batch_size": 1, "max_train_steps": 2}
    plan = plans.plan(bench, recipe(tmp_path, test_fraction=0, training=settings))
    found = {b["width"]: (b["pictures"], b["samples"], b["upscaled"], b["unseen"]) for b in plan["buckets"]}
    assert found == {96: (1, 1, 0, 0), 80: (1, 1, 0, 0), 64: (2, 2, 0, 1)}
    assert plan["smaller"] == {"96": 1} and plan["enlarged"]["pictures"] == 0
    asked = plans.plan(bench, recipe(tmp_path, training=settings | {"bucket_no_upscale": False}))
    assert asked["smaller"] == {} and asked["enlarged"]["pictures"] == 1


def test_the_worst_crops_are_named_and_drawn_and_a_picture_on_its_side_counts_upright(bench: Bench, tmp_path: Path):
    for i in range(25):
        keep(tmp_path, f"{i:02}.png", (64 + 2 * i, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    keep(tmp_path, "turned.jpg", (256, 64), exif=exif.tobytes())
    worst = plans.plan(bench, recipe(tmp_path))["worst_crops"]
    with Path(worst["table"]).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 26 and table[-1] == {
        "file_name": "00.png", "width": "64", "height": "64", "bucket": "64x64", "scale": "1.0000",
        "cropped": "0.0000", "padded": "0.0000"}  # fmt: skip
    names = [entry["file_name"] for entry in worst["pictures"]]
    assert names == ["turned.jpg", *(f"{i:02}.png" for i in range(24, 5, -1))]
    assert (worst["pictures"][0]["width"], worst["pictures"][0]["height"]) == (64, 256)
    with Image.open(worst["sheet"]) as sheet:
        assert sheet.size == (5 * (CELL + GAP) + GAP, TITLE + 4 * (CELL + LINES * LINE + GAP) + GAP)


def test_without_a_crop_there_is_no_sheet(bench: Bench, tmp_path: Path):
    keep(tmp_path, "square.png", (64, 64))
    crops = plans.plan(bench, recipe(tmp_path))["worst_crops"]
    assert (crops["sheet"], crops["pictures"]) == (None, [])
    assert list((bench.workspace.home / "plans").iterdir()) == [Path(crops["table"])]


def test_padding_takes_the_place_of_cropping(bench: Bench, tmp_path: Path):
    keep(tmp_path, "wide.png", (128, 64))
    plan = plans.plan(bench, recipe(tmp_path, training={"crop": "pad"}))
    assert (plan["pixels_cropped"], plan["buckets"][0]["padded"]["mean"]) == (0, pytest.approx(0.5))
    assert plan["worst_crops"]["pictures"][0]["padded"] == pytest.approx(0.5)
    with Image.open(plan["worst_crops"]["sheet"]) as sheet:
        above = sheet.getpixel((GAP + CELL // 2, TITLE + GAP + CELL // 8))
    assert above == PADDING


def test_sizes_that_a_curation_has_found_need_no_file(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A PNG that states behind its pixels that it lies on its side: the header does not tell, the curation does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    keep(tmp_path, "turned.png", (256, 64), exif=exif.tobytes())
    plain = recipe(tmp_path, max_aspect=5)
    curate(bench, plain.data, plain.curation, dataset="blobs", training_size=64)

    def nobody(item: Item) -> None:
        raise AssertionError(f"{item.file_name} was opened although its size is known")

    monkeypatch.setattr(placing, "_size_in_header", nobody)
    (entry,) = plans.plan(bench, plain)["worst_crops"]["pictures"]
    assert (entry["width"], entry["height"]) == (64, 256)


def test_captions_that_are_cut_are_counted_with_the_longest(bench: Bench, tmp_path: Path):
    for i, words in enumerate((3, 30, 60)):
        keep(tmp_path, f"{i}.png", (64, 64), caption="fox " * words)
    (line,) = plans.plan(bench, recipe(tmp_path))["captions"]
    assert (line["tokenizer"], line["limit"], line["longer"]) == ("tokenizer", 24, 2)
    assert line["worst"]["file_name"] == "2.png" and line["worst"]["tokens"] >= 62


def test_planning_loads_no_torch():
    code = "import sys, flows.plans; print(sorted({'torch', 'transformers', 'prefect'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
