import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from components.demo.emoji import CONCEPTS_PATH, dominant_color, drawings, on_white, write_image_folder
from components.errors import BadInput
from tests.emoji import write_packages


@pytest.fixture
def node_modules(tmp_path: Path) -> Path:
    """Two emoji and a flag: a rocket that is a concept, and a face that is none."""
    return write_packages(tmp_path / "node_modules")


def test_the_folder_is_an_image_folder_with_provenance_in_every_row(node_modules: Path, tmp_path: Path):
    assert write_image_folder(node_modules, tmp_path / "out") == 6
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    rocket = next(row for row in rows if row["file_name"] == "fluent-1f680.png")
    assert rocket == {
        "file_name": "fluent-1f680.png", "text": "rocket, fluent style", "group": "1f680", "name": "rocket",
        "synonyms": ["space ship", "space", "launch"], "style": "fluent", "color": "red", "concrete": True,
        "license": "MIT", "author": "Microsoft, packaged by LobeHub",
        "source": "https://github.com/microsoft/fluentui-emoji",
    }  # fmt: skip
    assert {row["license"] for row in rows} == {"Apache-2.0", "CC-BY-4.0", "MIT"}
    for row in rows:
        with Image.open(tmp_path / "out" / row["file_name"]) as image:
            assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (64, 64), (255, 255, 255))


def test_flags_are_left_out_and_faces_are_no_concepts(node_modules: Path):
    assert {(d.name, d.concrete) for d in drawings(node_modules)} == {("rocket", True), ("grinning face", False)}


def test_a_missing_package_is_named_with_the_mend(tmp_path: Path):
    with pytest.raises(BadInput, match="npm install emojibase-data"):
        list(drawings(tmp_path))


def test_a_transparent_edge_gets_no_dark_rim_on_white():
    image = Image.new("RGBA", (128, 128), (0, 0, 0, 0))  # transparent black
    ImageDraw.Draw(image).rectangle((0, 0, 63, 127), fill=(255, 0, 0, 255))
    green = on_white(image, 64).getchannel("G")
    assert green.getextrema() == (0, 255)
    assert on_white(image, 64).getchannel("R").getextrema()[0] > 250


@pytest.mark.parametrize(
    ("rgb", "word"),
    [((220, 30, 30), "red"), ((250, 140, 30), "orange"), ((250, 205, 40), "yellow"), ((40, 160, 80), "green"),
     ((40, 110, 230), "blue"), ((130, 70, 190), "purple"), ((128, 128, 128), None)],
)  # fmt: skip
def test_colour_words_are_those_that_people_use(rgb: tuple[int, int, int], word: str | None):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((10, 10, 54, 54), fill=rgb)
    assert dominant_color(image) == word


def test_every_colour_of_the_demo_is_taught_by_circles_squares_and_hearts():
    concepts = CONCEPTS_PATH.read_text(encoding="utf-8").splitlines()
    for color in ("red", "orange", "green", "blue", "purple"):
        assert {f"{color} circle", f"{color} square", f"{color} heart"} <= set(concepts)
