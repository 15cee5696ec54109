"""The demo's icons: what is held out, that nothing of it leaks, and that their colours can be read off."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.config import CurationConfig, DataConfig, DataSource
from components.curation.manifest import read_manifest
from components.curation.snapshots import curate
from components.demo.icons import (
    ATTRIBUTION_NAME,
    HELD_OUT_CONCEPTS,
    PALETTE,
    Glyphs,
    Icon,
    IconCounts,
    background_colour,
    caption,
    pictograms,
    plan_icons,
    write_icons,
)
from components.errors import BadInput
from flows.demo import known_words
from tests.curation.folders import new_bench

KNOWN_WORDS = known_words() - {"rocket", "cat"}


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return Glyphs()


@pytest.fixture(scope="module")
def icons(glyphs: Glyphs) -> list[Icon]:
    return plan_icons(KNOWN_WORDS, glyphs)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IconCounts]:
    folder = tmp_path_factory.mktemp("icons")
    return folder, write_icons(folder, KNOWN_WORDS)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_pictogram_of_the_table_is_a_solid_glyph_listed_once(glyphs: Glyphs):
    names = [pictogram.glyph for pictogram in pictograms()]
    assert len(names) == len(set(names)) > 400
    assert all(np.asarray(glyphs.mask(name)).max() == 255 for name in names)


def test_the_folder_is_an_ordinary_image_folder_with_provenance(written: tuple[Path, IconCounts]):
    folder, counts = written
    rows = rows_of(folder)
    assert Counter(row["split"] for row in rows) == {"train": counts.train, "test": counts.test}
    assert 500 <= counts.train <= 1000 and counts.test == HELD_OUT_CONCEPTS * len(PALETTE)
    for row in rows:
        assert row["licence"] == "CC-BY-4.0" and row["author"] and row["source"]
        with Image.open(folder / row["file_name"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
    assert "Creative Commons Attribution 4.0" in (folder / ATTRIBUTION_NAME).read_text()


def test_captions_name_the_thing_and_the_colour():
    assert caption("rocket", "red") == "red rocket, app icon style"


def test_the_background_of_every_icon_is_read_as_the_colour_its_caption_names(written: tuple[Path, IconCounts]):
    folder, _ = written
    for row in rows_of(folder):
        with Image.open(folder / row["file_name"]) as image:
            assert row["text"].startswith(f"{background_colour(image)} ")


def test_the_background_is_read_at_any_size(written: tuple[Path, IconCounts]):
    folder, _ = written
    row = rows_of(folder)[0]
    with Image.open(folder / row["file_name"]) as image:
        assert len({background_colour(image.resize((side, side))) for side in (32, 64, 200, 512)}) == 1


def test_all_concepts_are_known_to_the_base_and_held_out_ones_shown_in_every_colour(icons: list[Icon]):
    test = [icon for icon in icons if icon.split == "test"]
    assert all(set(icon.pictogram.concept.split()) <= KNOWN_WORDS for icon in icons)
    assert set(Counter(icon.pictogram.concept for icon in test).values()) == {len(PALETTE)}


def test_the_word_alone_tells_the_colour_since_every_pictogram_comes_in_all(icons: list[Icon]):
    colours = Counter(icon.pictogram.glyph for icon in icons)
    assert set(colours.values()) == {len(PALETTE)}


def test_no_training_icon_shows_or_is_named_after_a_held_out_concept(icons: list[Icon]):
    sides = {side: {icon.pictogram.concept for icon in icons if icon.split == side} for side in ("train", "test")}
    assert not sides["train"] & sides["test"]
    for held_out in sides["test"]:
        assert not any(set(held_out.split()) <= set(trained.split()) for trained in sides["train"])


def test_knowing_one_more_word_changes_few_held_out_concepts(glyphs: Glyphs, icons: list[Icon]):
    def held_out(icons: list[Icon]) -> set[str]:
        return {icon.pictogram.concept for icon in icons if icon.split == "test"}

    assert len(held_out(plan_icons(KNOWN_WORDS | {"rocket"}, glyphs)) - held_out(icons)) <= 1


def test_curation_keeps_every_icon_and_finds_no_leak(written: tuple[Path, IconCounts], tmp_path: Path):
    folder, counts = written
    bench = new_bench(tmp_path)
    data = DataConfig(sources=(DataSource(path=str(folder)),))
    product = curate(bench, data, CurationConfig(), dataset="app-icons", training_size=64)
    assert product.facts["rejected"] == 0
    assert (product.facts["train"], product.facts["test"]) == (counts.train, counts.test)
    sides: dict[str, set[str]] = {}
    for row in read_manifest(bench.store, product.facts["digest"]):
        sides.setdefault(row.component, set()).add(row.split)
    assert all(len(side) == 1 for side in sides.values())


def test_without_the_fonts_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("components.demo.icons.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"fontawesomefree is not installed.*'demo' extra"):
        Glyphs()
