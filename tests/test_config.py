"""The recipe: what it accepts, and what it says when it does not."""

from pathlib import Path

import pytest

from components.config import load_recipe, parse_recipe
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
        (MINIMAL + "repeats = 0\n", "recipe.toml: 'data.sources.0.repeats' is 0: Input should be greater"),
        (MINIMAL + "streaming = true\n", "'data.sources.0': streaming is for a data set of the hub"),
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
    assert "; 'data" not in str(refusal.value)  # a list is not too short as well, because what is in it is wrong
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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("mode_scale = 0.5", "mode_scale is 0.5, but timestep_sampling is 'uniform', expected 'mode'"),
        ('snr_gamma = 5.0\nloss_weighting = "p2"', "snr_gamma is 5.0, but loss_weighting is 'p2', expected 'none' or"),
        ('loss_weighting = "min_snr"', "loss_weighting is 'min_snr', but snr_gamma is not set, expected a number"),
        ("p2_k = 2.0", "p2_k is 2.0, but loss_weighting is 'none', expected 'p2'"),
        ("p2_gamma = 0.5", "p2_gamma is 0.5, but loss_weighting is 'none', expected 'p2'"),
        (
            "noise_offset = 0.1\nmultires_noise_iterations = 6",
            "multires_noise_iterations is 6, but noise_offset is 0.1, expected 0.0",
        ),
        (
            "multires_noise_discount = 0.8",
            "multires_noise_discount is 0.8, but multires_noise_iterations is 0, expected at least 1",
        ),
        (
            "use_dynamic_shifting = true\ndiscrete_flow_shift = 3.0",
            "use_dynamic_shifting is True, but discrete_flow_shift is 3.0, expected 1.0",
        ),
        (
            "stratified_timesteps = true\ntrain_batch_size = 1",
            "stratified_timesteps is True, but train_batch_size is 1, expected at least 2",
        ),
        ('timestep_sampling = "sigmoid"', "'training.timestep_sampling' is 'sigmoid'"),
        ('loss_weighting = "snr"', "'training.loss_weighting' is 'snr'"),
        ("mode_scale = 2.0", "'training.mode_scale' is 2.0"),
    ],
)
def test_diffusion_settings_that_contradict_each_other_are_refused(tmp_path: Path, settings: str, said: str):
    with pytest.raises(RecipeError) as refusal:
        load_recipe(write(tmp_path, f"{MINIMAL}[training]\n{settings}\n"))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        'timestep_sampling = "mode"\nmode_scale = 0.5\nstratified_timesteps = true',
        'loss_weighting = "min_snr"\nsnr_gamma = 5.0',
        'loss_weighting = "p2"\np2_k = 2.0\np2_gamma = 0.5',
        "multires_noise_iterations = 6\nmultires_noise_discount = 0.8\nip_noise_gamma = 0.1",
        "noise_offset = 0.05\ndiscrete_flow_shift = 3.0",
    ],
)
def test_diffusion_settings_that_agree_survive_a_round_trip(tmp_path: Path, settings: str):
    recipe = load_recipe(write(tmp_path, f"{MINIMAL}[training]\n{settings}\n"))
    assert parse_recipe(recipe.model_dump(mode="json"), origin="a stored recipe") == recipe
