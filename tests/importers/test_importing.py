"""Other trainers' configurations become recipes of the same meaning; what does not is said, key by key."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config import Recipe, TrainingConfig
from components.errors import BadInput
from components.importers import ai_toolkit as ai_toolkit_module
from components.importers import kohya as kohya_module
from components.importers import one_trainer as one_trainer_module
from components.importers.importing import Import, as_toml, import_config
from tests.curation.folders import pictures

KOHYA = {"pretrained_model_name_or_path": "owner/base", "network_module": "networks.lora", "train_data_dir": "tree",
         "output_name": "sks"}
ONE_TRAINER: dict[str, Any] = {"training_method": "LORA", "base_model_name": "owner/base", "model_type": "FLUX_DEV_1",
                               "concepts": [{"path": "data", "name": "data"}]}
AI_TOOLKIT: dict[str, Any] = {"network": {"type": "lora"}, "train": {}, "model": {"name_or_path": "owner/base"},
                              "datasets": [{"folder_path": "data"}]}


def kohya(folder: Path, dataset: str | None = None, **settings: Any) -> Import:
    path = folder / "kohya.toml"
    values = {key: value for key, value in (KOHYA | settings).items() if value is not None}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    if dataset is not None:
        (folder / "dataset.toml").write_text(dataset)
    return import_config(path, force=True)


def one_trainer(folder: Path, **settings: Any) -> Import:
    path = folder / "one.json"
    path.write_text(json.dumps(ONE_TRAINER | settings))
    return import_config(path, force=True)


def ai_toolkit(folder: Path, **sections: Any) -> Import:
    path = folder / "job.yaml"
    process = {"type": "sd_trainer", **AI_TOOLKIT, **sections}
    path.write_text(yaml.safe_dump({"job": "extension", "config": {"name": "job", "process": [process]}}))
    return import_config(path, force=True)


def said(done: Import, key: str, outcome: str | None = None) -> str:
    lines = [line for line in done.lines if line.key == key and outcome in (None, line.outcome)]
    assert lines, [line.key for line in done.lines]
    return " | ".join(f"{line.outcome}: {line.said}" for line in lines)


def scale(recipe: Recipe) -> tuple[float, float]:
    """Of the update, and the learning rate."""
    return recipe.training.lora_alpha / recipe.training.rank, recipe.training.learning_rate


# alpha and learning rate, together ------------------------------------------------------------------------------------


def test_kohyas_unwritten_alpha_is_one_and_comes_with_the_rate_that_was_meant_for_it(tmp_path: Path):
    done = kohya(tmp_path, network_dim=16, learning_rate=1e-4)
    assert scale(done.recipe) == (1 / 16, 1e-4)
    assert "kohya's default; the update is scaled by 1/16 = 0.0625" in said(done, "network_alpha")
    assert "at scale 1 it would be 6.25e-06" in said(done, "learning_rate")


def test_onetrainers_unwritten_alpha_is_one_as_well(tmp_path: Path):
    done = one_trainer(tmp_path, learning_rate=3e-4)
    assert (done.recipe.training.rank, *scale(done.recipe)) == (16, 1 / 16, 3e-4)
    assert "OneTrainer's default" in said(done, "lora_alpha")


@pytest.mark.parametrize(("model", "expected"), [
    ({"name_or_path": "owner/flux", "is_flux": True}, 1.0), ({"name_or_path": "owner/qwen", "arch": "qwen_image"}, 1.0),
    ({"name_or_path": "owner/xl", "is_xl": True}, 1 / 8), ({"name_or_path": "owner/sd", "arch": "sd1"}, 1 / 8),
    ({"name_or_path": "owner/sd"}, 1 / 8)])
def test_ai_toolkit_uses_alpha_for_unets_alone(tmp_path: Path, model: dict[str, Any], expected: float):
    done = ai_toolkit(tmp_path, network={"type": "lora", "linear": 32, "linear_alpha": 4}, model=model,
                      train={"lr": 2e-4})
    assert scale(done.recipe) == (expected, 2e-4)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"network_dim": 8, "network_alpha": 4, "learning_rate": 1e-4, "unet_lr": 2e-4}, (0.5, 2e-4)),
    ({"network_dim": 8, "network_alpha": 0}, (1.0, 2e-6)), ({}, (0.25, 2e-6))])
def test_kohyas_rates_and_defaults_mean_what_they_meant(
    tmp_path: Path, settings: dict[str, Any], expected: tuple[float, float]
):
    assert scale(kohya(tmp_path, **settings).recipe) == expected


def test_onetrainer_multiplies_its_rate_by_the_batch_when_told_to(tmp_path: Path):
    settings = {"learning_rate": 1e-4, "batch_size": 4, "gradient_accumulation_steps": 4}
    rates = [one_trainer(tmp_path, **settings, learning_rate_scaler=scaler).recipe.training.learning_rate
             for scaler in ("NONE", "SQRT_BATCH", "LINEAR_BOTH")]
    assert rates == [1e-4, 2e-4, pytest.approx(16e-4)]


def test_the_parts_own_rate_counts_before_onetrainers_general_one(tmp_path: Path):
    assert one_trainer(tmp_path, transformer={"learning_rate": 5e-5}).recipe.training.learning_rate == 5e-5


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, (True, None)), ({"text_encoder_lr": 5e-5}, (True, 5e-5)), ({"network_train_unet_only": True}, (False, None)),
    ({"text_encoder_lr": 0.0}, (False, None)), ({"network_args": ["algo=loha"]}, (False, None))])
def test_kohyas_trainers_train_text_encoders_too_unless_told_not_to(
    tmp_path: Path, settings: dict[str, Any], expected: tuple[bool, float | None]
):
    training = kohya(tmp_path, learning_rate=1e-4, **settings).recipe.training
    assert (training.train_text_encoder, training.text_encoder_lr) == expected


def test_an_optimizer_with_one_rate_takes_none_for_the_text_encoders(tmp_path: Path):
    done = kohya(tmp_path, learning_rate=1.0, text_encoder_lr=0.5, optimizer_type="Prodigy")
    assert (done.recipe.training.train_text_encoder, done.recipe.training.text_encoder_lr) == (True, None)
    assert "prodigy has one rate" in said(done, "text_encoder_lr", "ignored")


def test_the_others_text_encoders_follow_their_own_switches(tmp_path: Path):
    made = (one_trainer(tmp_path), one_trainer(tmp_path, text_encoder={"train": False}), ai_toolkit(tmp_path),
            ai_toolkit(tmp_path, train={"train_text_encoder": True}))
    assert [done.recipe.training.train_text_encoder for done in made] == [True, False, False, True]


# steps, repeats and captions ------------------------------------------------------------------------------------------


def test_steps_are_optimizer_steps_and_epochs_become_steps_where_pictures_can_be_counted(tmp_path: Path):
    pictures(tmp_path / "tree" / "3_sks", 5)
    pictures(tmp_path / "tree" / "ignored", 2)
    assert kohya(tmp_path, max_train_steps=70, gradient_accumulation_steps=4).recipe.training.max_train_steps == 70
    assert kohya(tmp_path).recipe.training.max_train_steps == 1600
    done = kohya(tmp_path, max_train_epochs=2, train_batch_size=4)
    assert done.recipe.training.max_train_steps == 2 * 4  # 15 pictures by 4 are 4 steps
    assert "2 epochs of 15 pictures by 4" in said(done, "max_train_epochs")
    away = kohya(tmp_path, max_train_epochs=2, train_data_dir="elsewhere")
    assert "not here to be counted" in said(away, "max_train_epochs", "note")


def test_onetrainers_epochs_and_balancing_become_steps_and_repeats(tmp_path: Path):
    pictures(tmp_path / "data", 6)
    concept = {"path": "data", "balancing": 2.6, "balancing_strategy": "REPEATS"}
    done = one_trainer(tmp_path, concepts=[concept], epochs=10, batch_size=3, learning_rate_warmup_steps=0.1)
    assert done.recipe.data.sources[0].repeats == 3
    assert (done.recipe.training.max_train_steps, done.recipe.training.lr_warmup_steps) == (60, 6)
    assert "2.6 becomes 3" in said(done, "concepts.0.balancing")


def test_kohyas_unwritten_caption_ending_is_pointed_out_and_a_written_one_kept(tmp_path: Path):
    done = kohya(tmp_path)
    assert "silently pass over .txt" in said(done, "train_data_dir", "note")
    assert done.recipe.data.sources[0].caption_extension == "any"
    assert kohya(tmp_path, caption_extension=".txt").recipe.data.sources[0].caption_extension == ".txt"


def test_how_many_lines_of_a_caption_file_count_follows_the_trainer(tmp_path: Path):
    lines = [done.recipe.data.sources[0].caption_lines for done in (
        kohya(tmp_path), kohya(tmp_path, enable_wildcard=True), one_trainer(tmp_path), ai_toolkit(tmp_path))]
    assert lines == ["first", "variants", "variants", "whole"]


def test_captions_are_dropped_as_often_as_there_also_where_that_is_never(tmp_path: Path):
    dropped = [done.recipe.training.caption_dropout_rate for done in (
        kohya(tmp_path), kohya(tmp_path, caption_dropout_rate=0.3), one_trainer(tmp_path),
        one_trainer(tmp_path, text_encoder={"dropout_probability": 0.2}), ai_toolkit(tmp_path))]
    assert dropped == [0.0, 0.3, 0.0, 0.2, 0.0]


def test_a_guidance_that_a_distilled_base_was_trained_at_is_not_taken_over(tmp_path: Path):
    done = kohya(tmp_path, guidance_scale=3.5)
    assert "told 1, whatever was said" in said(done, "guidance_scale", "ignored")
    assert done.recipe.evaluation.guidance_scale == Recipe.model_fields["evaluation"].default.guidance_scale


# data -----------------------------------------------------------------------------------------------------------------

DATASET = """
[general]
shuffle_caption = true
keep_tokens = 1
caption_extension = ".caption"
[[datasets]]
resolution = 512
bucket_no_upscale = false
batch_size = 4
caption_extension = ".txt"
  [[datasets.subsets]]
  image_dir = "10_folder"
  num_repeats = 3
  class_tokens = "sks dog"
  keep_tokens = 2
  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
  class_tokens = "dog"
  flip_aug = true
  num_repaets = 2
"""


def test_the_lower_level_of_a_dataset_configuration_wins_and_folder_names_mean_nothing(tmp_path: Path):
    (tmp_path / "data.toml").write_text(DATASET)
    done = import_config(tmp_path / "data.toml")
    first, second = done.recipe.data.sources
    assert (Path(first.path).name, first.layout, first.repeats, first.class_tokens, first.caption_extension) == (
        "10_folder", "folder", 3, "sks dog", ".txt")
    assert (second.is_reg, second.class_tokens) == (True, "dog")
    training = done.recipe.training
    assert (training.resolution, training.train_batch_size, training.shuffle_caption, training.keep_tokens) == (
        512, 4, True, 2)
    assert training.bucket_no_upscale is False
    assert "did you mean 'num_repeats'?" in said(done, "datasets.0.subsets.1.num_repaets", "unknown")
    assert "as they are" in said(done, "datasets.0.subsets.1.flip_aug", "ignored")


def test_a_training_configuration_reads_the_dataset_configuration_that_it_names(tmp_path: Path):
    done = kohya(tmp_path, DATASET, dataset_config="dataset.toml", train_data_dir=None, prior_loss_weight=0.5)
    assert len(done.recipe.data.sources) == 2
    assert (done.recipe.training.prior_loss_weight, done.recipe.training.train_batch_size) == (0.5, 4)


def test_regularisation_folders_masks_and_adapters_of_kohya_are_taken_over(tmp_path: Path):
    done = kohya(tmp_path, reg_data_dir="reg", prior_loss_weight=0.7, network_module="lycoris.kohya",
                 network_args=["algo=lokr", "factor=8"], optimizer_type="Prodigy", learning_rate=1.0,
                 optimizer_args=["weight_decay=0.2", "d_coef=2"], timestep_sampling="shift", discrete_flow_shift=3)
    training = done.recipe.training
    assert [source.is_reg for source in done.recipe.data.sources] == [False, True]
    assert {source.layout for source in done.recipe.data.sources} == {"kohya"}
    assert (training.adapter, training.prior_loss_weight, training.optimizer, training.weight_decay) == (
        "lokr", 0.7, "prodigy", 0.2)
    assert (training.timestep_sampling, training.discrete_flow_shift) == ("logit_normal", 3.0)
    assert {"network_args.factor", "optimizer_args.d_coef"} <= {
        line.key for line in done.lines if line.outcome == "ignored"}


def test_onetrainers_concepts_are_found_beside_the_file_and_those_switched_off_are_left_out(tmp_path: Path):
    tags = {"text": {"enable_tag_shuffling": True, "keep_tags_count": 2}, "image": {"enable_random_flip": True}}
    (tmp_path / "concepts.json").write_text(json.dumps([
        {"path": "data", "text": {"prompt_source": "filename"}}, {"path": "off", "enabled": False},
        {"path": "tags"} | tags]))
    settings = {"concepts": None, "concept_file_name": "training_concepts/concepts.json", "masked_training": True,
                "unmasked_weight": 0.2}
    done = one_trainer(tmp_path, **settings)
    assert [(Path(source.path).name, source.caption_from, source.masks) for source in done.recipe.data.sources] == [
        ("data", "file_name", "masklabel"), ("tags", "files", "masklabel")]
    assert (done.recipe.training.keep_tokens, done.recipe.training.unmasked_weight) == (2, 0.2)
    assert "switched off" in said(done, "concepts.1.path")
    alone = import_config(tmp_path / "concepts.json").recipe
    assert alone.training == TrainingConfig(shuffle_caption=True, keep_tokens=2)  # the rest is Safelight's own


def test_onetrainers_times_and_weights_are_the_same_densities(tmp_path: Path):
    training = one_trainer(tmp_path, timestep_distribution="LOGIT_NORMAL", noising_bias=0.5, noising_weight=-0.2,
                           loss_weight_fn="MIN_SNR_GAMMA", timestep_shift=3.0).recipe.training
    assert (training.timestep_sampling, training.logit_mean, training.logit_std) == ("logit_normal", 0.5, 0.8)
    assert (training.loss_weighting, training.snr_gamma, training.discrete_flow_shift) == ("min_snr", 5.0, 3.0)


def test_ai_toolkits_trigger_is_not_put_into_captions_of_the_class(tmp_path: Path):
    done = ai_toolkit(tmp_path, trigger_word="sks", train={"reg_weight": 0.5}, datasets=[
        {"folder_path": "data", "caption_ext": "txt", "num_repeats": 2, "resolution": [512, 768], "mask_path": "masks"},
        {"folder_path": "reg", "is_reg": True, "default_caption": "a dog"}])
    first, second = done.recipe.data.sources
    assert (first.trigger, first.repeats, first.caption_extension) == ("sks", 2, ".txt")
    assert first.masks == str(tmp_path / "masks")
    assert (second.trigger, second.is_reg, second.class_tokens) == (None, True, "a dog")
    assert (done.recipe.training.resolution, done.recipe.training.prior_loss_weight) == ((768, 512), 0.5)
    assert done.recipe.training.masked_loss


# keys that are not taken over -----------------------------------------------------------------------------------------


def test_a_misspelt_key_is_reported_and_not_imported(tmp_path: Path):
    cases = (
        (kohya(tmp_path, min_snr_gama=5), "min_snr_gama", "min_snr_gamma"),
        (one_trainer(tmp_path, lora_rnak=64), "lora_rnak", "lora_rank"),
        (ai_toolkit(tmp_path, train={"lr": 1e-4, "max_grad_nrom": 3}), "train.max_grad_nrom", "max_grad_norm"))
    for done, key, meant in cases:
        assert said(done, key) == f"unknown: {said(done, key)[9:]}" and f"did you mean {meant!r}?" in said(done, key)
    assert cases[0][0].recipe.training.snr_gamma is None
    assert cases[1][0].recipe.training.rank == 16


def test_every_key_is_spoken_of_and_secrets_are_not_shown(tmp_path: Path):
    done = kohya(tmp_path, wandb_api_key="hunter2", huggingface_token="hf_hunter2", clip_skip=2, seed=7, foo=1)
    spoken = {line.key for line in done.lines}
    assert {"wandb_api_key", "huggingface_token", "clip_skip", "seed", "foo", "network_alpha"} <= spoken
    assert "hunter2" not in "".join(line.said for line in done.lines) + done.path.read_text()


def test_reasons_are_given_for_settings_that_there_are():
    modules = {"kohya": kohya_module, "one_trainer": one_trainer_module, "ai_toolkit": ai_toolkit_module}
    for trainer, module in modules.items():
        lists = tomllib.loads((Path(module.__file__).parent / "known_keys.toml").read_text())[trainer]
        assert module.REASONS.keys() <= {word for text in lists.values() for word in text.split()}


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "body", "message"), [
    ("a.toml", "x = 1", "no configuration of kohya, ai-toolkit, OneTrainer"), ("a.json", "[]", "no configuration of"),
    ("a.toml", "x = ", "cannot be read"), ("a.yaml", "a: [1", "cannot be read"), ("a.json", "{", "cannot be read"),
    ("a.txt", "", "expected a file that ends in"), ("gone.toml", None, "No such file"),
    ("a.json", json.dumps({"training_method": "FINE_TUNE", "concepts": []}), "Safelight trains adapters"),
    ("a.json", json.dumps({"training_method": "LORA", "concepts": []}), "names no folder of pictures"),
    ("a.json", json.dumps({"training_method": "LORA", "lora_rank": "many", "concepts": []}), "lora_rank is 'many'"),
    ("a.toml", 'network_module = "networks.lora"\ndataset_config = "gone.toml"', "gone.toml is no TOML file"),
    ("a.toml", 'network_module = "networks.dylora"\nnetwork_args = ["algo=boft"]\ntrain_data_dir = "x"', "trains boft"),
    ("a.yaml", "config: {process: [{type: sd_trainer, network: {type: lorm}}]}", "network.type is 'lorm'"),
    ("a.yaml", "config: {process: [3]}", "config.process is empty"),
    ("a.yaml", "!!python/object/apply:os.system [id]", "cannot be read"),
    ("a.yaml", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
     "more than 100,000 values"),
    ("a.toml", "[general]\n[[datasets]]\nsubsets = [3]\n", "levels are tables"),
])
def test_a_file_that_is_no_configuration_is_refused_in_one_line(
    tmp_path: Path, name: str, body: str | None, message: str
):
    if body is not None:
        (tmp_path / name).write_text(body)
    with pytest.raises(BadInput, match=message) as caught:
        import_config(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("*-recipe.toml")) == []


def test_a_recipe_that_is_there_is_not_overwritten_unless_forced(tmp_path: Path):
    done = kohya(tmp_path)
    with pytest.raises(BadInput, match="is there already; pass --force"):
        import_config(tmp_path / "kohya.toml")
    assert import_config(tmp_path / "kohya.toml", out=tmp_path / "other.toml").recipe == done.recipe


def test_any_text_survives_the_way_through_toml(tmp_path: Path):
    path = 'a "b" \\ \t é 猫 \x7f \u0001'
    document = {"name": "x", "data": {"sources": [{"path": path, "repeats": 2}]}, "training": {"learning_rate": 1e-05}}
    assert tomllib.loads(as_toml(document, "comment")) == document
