"""The recipe: what it accepts, and what it says when it does not."""

from pathlib import Path

import pytest

from components.config import load_recipe
from components.errors import RecipeError

MINIMAL = 'name = "cats"\n[[data.sources]]\npath = "pictures"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_of_three_lines_is_enough_and_paths_count_from_its_folder(tmp_path: Path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.data.sources[0].path == str(tmp_path / "pictures")
    assert recipe.training.rank == 16


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "[training]\nrnk = 4\n", "unknown key 'training.rnk', did you mean 'rank'?"),
        (MINIMAL + "[trainig]\nrank = 4\n", "unknown key 'trainig', did you mean 'training'?"),
        (MINIMAL.replace("path", "pth"), "unknown key 'data.sources.0.pth', did you mean 'path'?"),
        (MINIMAL + "[training]\nrank = 0\n", "'training.rank' is 0"),
        (
            MINIMAL + "[training]\nmax_train_steps = 5\nlr_warmup_steps = 6\n",
            "lr_warmup_steps 6 is more than max_train_steps 5",
        ),
        (MINIMAL + '[evaluation.palette]\nred = "rouge"\n', "colour 'red' is 'rouge', expected #rrggbb"),
        ('name = "cats"\n', "'data' is missing"),
        ("name = cats\n", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_that_names_the_key(tmp_path: Path, text: str, said: str):
    with pytest.raises(RecipeError) as refusal:
        load_recipe(write(tmp_path, text))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value).removesuffix("\n")
    assert refusal.value.exit_code == 2


def test_a_missing_recipe_and_a_folder_are_told_apart(tmp_path: Path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_set_overrides_a_value_and_bare_words_are_strings(tmp_path: Path):
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides=["training.rank=32", "promotion.policy=auto"])
    assert (recipe.training.rank, recipe.promotion.policy) == (32, "auto")
    with pytest.raises(RecipeError, match=r"expected section\.key=value"):
        load_recipe(write(tmp_path, MINIMAL), overrides=["training.rank"])


def test_data_replaces_the_sources(tmp_path: Path):
    other = tmp_path / "other"
    recipe = load_recipe(write(tmp_path, MINIMAL), data=other)
    assert [source.path for source in recipe.data.sources] == [str(other)]
