"""The packaged recipes: they load, and the demo's asks for the colours that its pictures have."""

from pathlib import Path

import pytest

from components.config import load_recipe
from components.demo.icons import PALETTE
from flows.demo import RECIPE, known_words


@pytest.mark.parametrize("path", sorted(RECIPE.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_every_packaged_recipe_is_valid(path: Path):
    load_recipe(path)


def test_the_demos_palette_is_that_of_its_icons():
    asked = load_recipe(RECIPE).evaluation.palette
    assert asked == {word: "#{:02x}{:02x}{:02x}".format(*colour) for word, colour in PALETTE.items()}


def test_the_base_knows_the_words_that_the_demo_asks_for():
    assert {"rocket", "heart"} <= known_words()
