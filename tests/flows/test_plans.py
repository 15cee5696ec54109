"""The plan: counted by hand on a folder of known sizes, quick, and without torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.config import CurationConfig, DataConfig, DataSource, Recipe, TrainingConfig
from components.curation.sources import read_sources
from components.stages import Bench
from flows import plans
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
    plan = plans.plan(bench, recipe(tmp_path, test_fraction=0.1))
    (bucket,) = plan["buckets"]
    assert (bucket["width"], bucket["height"], bucket["pictures"], bucket["repeats"]) == (64, 64, 8, 20)
    assert bucket["samples"] == pytest.approx(18) and (bucket["batches"], bucket["steps"]) == (5, 100)
    assert bucket["cropped"] == {"mean": pytest.approx(0.5 / 8), "worst": pytest.approx(0.5)}
    assert bucket["upscaled"] == 1
    assert plan["epochs"] == pytest.approx(100 * 4 / 18)


def test_several_buckets_share_the_steps_by_their_samples(tmp_path: Path):
    from components.latents.buckets import Bucket

    for i in range(3):
        keep(tmp_path, f"square-{i}.png", (64, 64))
    keep(tmp_path, "wide.png", (128, 64))
    settings = recipe(tmp_path, test_fraction=0)
    placed = plans._place(read_sources(settings.data), (Bucket(64, 64), Bucket(96, 48)), settings)
    lines = plans._buckets(placed, settings)
    found = [(line["width"], line["pictures"], line["batches"], line["steps"]) for line in lines]
    assert found == [(64, 3, 1, 75), (96, 1, 1, 25)]


def test_the_worst_crops_are_named_and_drawn_and_a_picture_on_its_side_counts_upright(bench: Bench, tmp_path: Path):
    for i in range(25):
        keep(tmp_path, f"{i:02}.png", (64 + 2 * i, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    keep(tmp_path, "turned.jpg", (256, 64), exif=exif.tobytes())
    worst = plans.plan(bench, recipe(tmp_path))["worst_crops"]
    names = [entry["file_name"] for entry in worst["pictures"]]
    assert names == ["turned.jpg", *(f"{i:02}.png" for i in range(24, 5, -1))]
    assert (worst["pictures"][0]["width"], worst["pictures"][0]["height"]) == (64, 256)
    with Image.open(worst["sheet"]) as sheet:
        assert sheet.size == (5 * 200 + 8, 4 * 218 + 8)


def test_without_a_crop_there_is_no_sheet(bench: Bench, tmp_path: Path):
    keep(tmp_path, "square.png", (64, 64))
    assert plans.plan(bench, recipe(tmp_path))["worst_crops"] == {"sheet": None, "pictures": []}
    assert not (bench.workspace.home / "plans").exists()


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
