"""Text encoders and tokens that train with the denoiser: what moves, what does not, and that files hold all of it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageChops
from safetensors.torch import load, load_file
from torch import Tensor

from components.config import SIZE_SETTINGS, TEXT_SETTINGS, TrainingConfig, looking_at
from components.diffusion.draws import Draw
from components.errors import BadInput, RecipeError
from components.evaluation.generation import Request, Settings, draw_batch, open_pipeline
from components.latents.keys import cache_key, caption_item, usual_sizing
from components.latents.wording import Wording
from components.layouts.files import read_adapter
from components.layouts.skeleton import skeleton_of
from components.layouts.tokens import Token, bundled, unbundled
from components.stages import Product, stage_key
from components.tensors import to_safetensors
from components.training.conversion import convert
from components.training.imports import imported_adapter
from components.training.loop import set_learning_rate
from components.training.optimizers import OPTIMIZERS
from components.training.samples import cached_samples
from components.training.texts import PULL, TextSide, text_side
from flows.keys import fine_tune_key
from tests.chain import Chain

CAPTIONS = ["disc, red sign", "a ring, blue sign", "", "sign"] * 2
TOKEN = {"placeholder_token": "sign", "num_vectors": 2, "initializer_token": "ab"}
BOTH = TOKEN | {"train_text_encoder": True, "rank": 4, "lora_alpha": 3.0, "learning_rate": 1e-2}
SHORT = (
    "training.max_train_steps=3",
    "training.checkpointing_steps=3",
    "training.preview_prompts=2",
    "training.validation_items=4",
    "training.validation_times=2",
)
FROM_A_FILE = ("training.rank=16", "training.lora_alpha=16.0")  # the defaults: the file decides


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain.build(tmp_path_factory.mktemp("texts"))
    chain.cache(chain.recipe())
    return chain


@pytest.fixture(scope="module")
def trained(chain: Chain) -> Product:
    return chain.fine_tune(chain.recipe(*SHORT, *settings(**BOTH)), work="trained")


@pytest.fixture
def file(chain: Chain, trained: Product, tmp_path: Path) -> Path:
    path = tmp_path / "ours.safetensors"
    path.write_bytes(chain.bench.store.read(trained.facts["sha256"]))
    return path


def settings(**values: Any) -> tuple[str, ...]:
    return tuple(f"training.{key}={json.dumps(value)}" for key, value in values.items())


def side(chain: Chain, **values: Any) -> TextSide:
    text = text_side(chain.base(), TrainingConfig.model_validate(values), "cpu", torch.float32, CAPTIONS)
    assert text is not None
    return text


def encoder(text: TextSide) -> Any:
    return text.pipeline_parts["text_encoder"]


def drawn(pipeline: Any, prompt: str = "disc, red sign") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return torch.from_numpy(pipeline(prompt, generator=generator, **size).images)


# training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [({"train_text_encoder": True}, {"LoRA"}), (TOKEN, {"rows"}), (BOTH, {"LoRA", "rows"})],
    ids=["LoRA", "token", "both"],
)
def test_a_step_moves_what_is_asked_for_and_no_bit_of_anything_else(
    chain: Chain, asked: dict[str, Any], kinds: set[str]
):
    training, text = TrainingConfig.model_validate({"learning_rate": 1e-2} | asked), side(chain, **asked)
    before = {name: parameter.detach().clone() for name, parameter in encoder(text).named_parameters()}
    optimizer = OPTIMIZERS["adamw"](text.parameters, training)
    set_learning_rate(optimizer, training.learning_rate)
    for _ in range(2):  # in the first the factor B, which is zero, hides the factor A
        optimizer.zero_grad()
        text.condition(CAPTIONS, {})["prompt_embeds"].square().mean().backward()
        optimizer.step()
        text.settle()
    moved = {name for name, value in encoder(text).named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name.removeprefix("text_encoder.") for name, _ in text.parameters}
    assert {"rows" if name.endswith("learnt.weight") else "LoRA" for name in moved} == kinds


def test_the_token_stands_for_its_vectors_and_the_vocabularys_own_rows_are_read_unchanged(chain: Chain):
    untouched = StableDiffusionPipeline.from_pretrained(chain.base_path)
    ids = untouched.tokenizer(["ab"], add_special_tokens=False).input_ids[0]
    matrix = untouched.text_encoder.get_input_embeddings().weight
    text = side(chain, **TOKEN | {"num_vectors": 3})
    (token,) = text.tokens
    assert torch.equal(token.vectors["text_encoder"], matrix[[ids[0], ids[1], ids[0]]].detach())
    embedding, first = encoder(text).get_input_embeddings(), len(matrix)
    everything = torch.arange(first + 3)
    assert torch.equal(embedding(everything)[:first], matrix)
    assert torch.equal(embedding(everything)[first:], token.vectors["text_encoder"])
    two = side(chain, **TOKEN)
    with torch.no_grad():
        token_and_word = (two.condition([f"a {word}."], {})["prompt_embeds"] for word in ("sign", "ab"))
        assert torch.equal(*token_and_word)


def test_without_an_initializer_the_first_rows_are_noise_of_the_vocabularys_spread(chain: Chain):
    tokens = [side(chain, placeholder_token="sign", num_vectors=60, seed=seed).tokens[0] for seed in (1, 1, 2)]
    rows = [token.vectors["text_encoder"] for token in tokens]
    spread = encoder(side(chain, **TOKEN)).get_input_embeddings().known.weight.std()
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert rows[0].std() / spread == pytest.approx(1, abs=0.1)


def test_the_spread_of_new_rows_is_pulled_to_that_of_the_vocabulary(chain: Chain):
    text = side(chain, **TOKEN)
    rows = encoder(text).get_input_embeddings()
    with torch.no_grad():
        rows.learnt.weight.mul_(10)
    before, spread = rows.learnt.weight.detach().clone(), rows.known.weight.std()
    text.settle()
    assert torch.allclose(rows.learnt.weight, before * (spread / before.std()) ** PULL)
    for _ in range(100):
        text.settle()
    assert (rows.learnt.weight.std() / spread).item() == pytest.approx(1, rel=1e-3)


def test_a_limit_on_norms_holds_for_the_text_encoders_too(chain: Chain):
    text = side(chain, train_text_encoder=True, scale_weight_norms=0.5)
    with torch.no_grad():
        for _, parameter in text.parameters:
            parameter.add_(1.0)
    text.settle()
    layers = [layer for layer in encoder(text).modules() if isinstance(layer, BaseTunerLayer)]
    norms = [layer.get_delta_weight("default").norm().item() for layer in layers]  # type: ignore[operator]
    assert norms == pytest.approx([0.5] * 12)


def test_dropped_captions_are_the_empty_prompt_as_it_is_read_now(chain: Chain):
    text, dropped = side(chain, **BOTH), torch.tensor([True, False] * 4)
    with torch.no_grad():
        shown = text.condition(CAPTIONS, {}, dropped)["prompt_embeds"]
        said = ["" if drop else caption for caption, drop in zip(CAPTIONS, dropped.tolist(), strict=True)]
        assert torch.equal(shown, text.condition(said, {})["prompt_embeds"])


def test_the_texts_of_a_batch_are_those_that_its_embeddings_were_made_of(chain: Chain):
    recipe = chain.recipe("training.shuffle_caption=true", "training.caption_wordings=4")
    chain.cache(recipe)
    rows = [row for row in chain.curate(recipe) if row.split == "train"]
    samples = cached_samples(
        chain.bench,
        rows,
        chain.base(),
        usual_sizing(chain.base(), 32),
        masked=False,
        wording=Wording.of(recipe.training),
    )
    batch = samples.batch(range(12))
    drawn = samples.reworded(batch, Draw(0, 5, batch.sample_ids))
    assert batch.texts != drawn.texts
    for found in (batch, drawn):
        cached = samples.prompts([caption_item(text).key for text in found.texts])
        assert torch.equal(found.cond["prompt_embeds"], cached["prompt_embeds"])


def test_each_kind_of_parameter_has_its_learning_rate_and_rows_do_not_decay(chain: Chain):
    training = {**BOTH, "text_encoder_lr": 2e-3, "token_learning_rate": 5e-2, "loraplus_lr_ratio": 4.0}
    parameters = side(chain, **training).parameters
    optimizer = OPTIMIZERS["adamw"](parameters, TrainingConfig.model_validate(training))
    set_learning_rate(optimizer, 1e-2)
    names = {id(parameter): name for name, parameter in parameters}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    for name, rates in found.items():
        expected = (5e-2, 0.0) if name.endswith("learnt.weight") else (8e-3 if "lora_B" in name else 2e-3, 0.01)
        assert rates == pytest.approx(expected), name


def test_a_recipe_without_a_text_side_has_the_key_that_it_had_before_there_was_any(chain: Chain):
    base = chain.base()
    plain, *others = (
        fine_tune_key(chain.recipe(*settings(**asked)), base, "snapshot")
        for asked in ({}, {"train_text_encoder": True}, TOKEN, BOTH)
    )
    earlier = chain.recipe().training.model_dump(mode="json", exclude={"init_adapter", *SIZE_SETTINGS, *TEXT_SETTINGS})
    inputs = {"cache": cache_key("snapshot", base, usual_sizing(base, 32), Wording()), "base": base.digest}
    assert plain == stage_key("fine-tune", inputs=inputs, config=earlier)
    assert len({plain, *others}) == 4


# files ------------------------------------------------------------------------------------------------------------


def test_the_gallerys_pipeline_draws_to_the_pixel_what_the_training_previewed(chain: Chain, trained: Product):
    pipeline = open_pipeline(chain.bench.store, chain.base(), trained.facts["sha256"], "auto")
    requests = [Request(i, text, None, seed=i) for i, text in enumerate(trained.facts["preview_prompts"])]
    images = draw_batch(pipeline, requests, Settings(12, 4.0, "auto", 32, 2, torch.get_num_threads()))
    for i, image in enumerate(images):
        preview = Image.open(io.BytesIO(chain.bench.store.read(trained.outputs[f"preview-3-{i}"].sha256)))
        assert ImageChops.difference(image, preview).getbbox() is None


def test_the_adapter_file_names_its_parts_as_stock_programs_do(chain: Chain, trained: Product):
    tensors, metadata = read_adapter(chain.bench.store.path(trained.facts["sha256"]))
    said = json.loads(metadata["lora_adapter_metadata"])
    assert "text_encoder.text_model.encoder.layers.1.mlp.fc2.lora_B.weight" in tensors
    assert tensors["bundle_emb.sign.string_to_param.*"].shape == (2, 16)
    assert (said["text_encoder.r"], said["text_encoder.lora_alpha"], said["unet.lora_alpha"]) == (4, 3.0, 3.0)
    assert str(chain.base_path) not in json.dumps(metadata)
    layers = {key.split(".")[-3] for key in tensors if key.startswith("text_encoder.")}
    assert layers == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_a_file_of_another_layout_brings_text_layers_and_token_back(
    chain: Chain, file: Path, layout: Any, tmp_path: Path
):
    """kohya's names and alpha, which is not the rank; then through the import, to the same pictures."""
    made = convert(file, chain.base(), tmp_path / "out", [layout]).files[layout]
    tensors, _ = read_adapter(made)
    prefix = {"kohya": "lora_te_", "comfyui": "text_encoders.clip_l.transformer."}[layout]
    assert {tensor.item() for key, tensor in tensors.items() if key.startswith(prefix) and "alpha" in key} == {3.0}
    data, facts = imported_adapter(made, chain.base())
    assert facts["layout"] == layout
    store = chain.bench.store
    pictures = [
        drawn(open_pipeline(store, chain.base(), store.put(body).sha256, "auto")) for body in (file.read_bytes(), data)
    ]
    untouched = drawn(StableDiffusionPipeline.from_pretrained(chain.base_path))
    torch.testing.assert_close(pictures[1], pictures[0], rtol=0, atol=1e-5)
    assert (pictures[0] - untouched).abs().max() > 1e-2


def test_diffusers_reads_the_exported_files_and_draws_what_ours_does(chain: Chain, file: Path, tmp_path: Path):
    files = convert(file, chain.base(), tmp_path / "out", ["diffusers"]).files
    assert {name: path.name for name, path in files.items()} == {
        "diffusers": "pytorch_lora_weights.safetensors",
        "embeddings": "learned_embeds.safetensors",
    }
    pipeline = StableDiffusionPipeline.from_pretrained(chain.base_path)
    pipeline.load_textual_inversion(str(tmp_path / "out"))
    pipeline.load_lora_weights(str(tmp_path / "out"), weight_name=files["diffusers"].name)
    ours = open_pipeline(chain.bench.store, chain.base(), chain.bench.store.put_file(file).sha256, "auto")
    torch.testing.assert_close(drawn(pipeline), drawn(ours), rtol=0, atol=1e-6)


def test_a_merged_folder_has_text_layers_and_token_in_it(chain: Chain, file: Path, tmp_path: Path):
    folder = convert(file, chain.base(), tmp_path / "merged", merged=True).files["pipeline"]
    ours = open_pipeline(chain.bench.store, chain.base(), chain.bench.store.put_file(file).sha256, "auto")
    torch.testing.assert_close(drawn(StableDiffusionPipeline.from_pretrained(folder)), drawn(ours), rtol=0, atol=1e-5)
    untouched = load_file(chain.base_path / "text_encoder" / "model.safetensors")
    assert set(load_file(folder / "text_encoder" / "model.safetensors")) == set(untouched)


@pytest.mark.parametrize(
    ("pipeline", "keys"),
    [
        ("StableDiffusionPipeline", {"text_encoder": "string_to_param.*"}),
        ("StableDiffusionXLPipeline", {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
        ("FluxPipeline", {"text_encoder": "clip_l"}),
    ],
)
def test_bundled_tokens_have_the_names_of_other_programs_and_come_back(pipeline: str, keys: dict[str, str]):
    tokens = [Token(name, {part: torch.randn(n, 8) for part in keys}) for n, name in ((2, "<a>"), (1, "<b>"))]
    tensors = bundled(tokens, pipeline)
    assert set(tensors) == {f"bundle_emb.{name}.{key}" for name in ("<a>", "<b>") for key in keys.values()}
    rest, back = unbundled(tensors | {"lora_te_x.alpha": torch.ones(())}, pipeline, "file")
    assert set(rest) == {"lora_te_x.alpha"}
    for mine, theirs in zip(tokens, back, strict=True):
        assert mine.name == theirs.name and mine.vectors.keys() == theirs.vectors.keys()
        assert all(torch.equal(mine.vectors[part], theirs.vectors[part]) for part in keys)
    with pytest.raises(BadInput, match=r"'bundle_emb.<c>.t5' of shape .* is no embedding for"):
        unbundled({"bundle_emb.<c>.t5": torch.ones(1, 8)}, pipeline, "file")


def test_vectors_for_an_encoder_of_another_width_are_refused(chain: Chain, file: Path):
    tensors, metadata = read_adapter(file)
    wide = tensors | {"bundle_emb.sign.string_to_param.*": torch.ones(1, 768)}
    file.write_bytes(to_safetensors(wide, metadata))
    with pytest.raises(BadInput, match="has vectors of 768 for text_encoder, whose own have 16"):
        imported_adapter(file, chain.base())
    assert skeleton_of(chain.base()).shapes["text_encoder"]


# going on from a file ---------------------------------------------------------------------------------------------


def test_a_training_goes_on_from_the_text_side_of_a_file(chain: Chain, trained: Product, file: Path):
    looked = chain.fine_tune(looking_at(chain.recipe(*SHORT), file), work="look")
    again, ours = (load(chain.bench.store.read(sha256)) for sha256 in (looked.facts["sha256"], trained.facts["sha256"]))
    assert again.keys() == ours.keys() and all(torch.equal(again[key], ours[key]) for key in ours)
    losses, before = (load_file(chain.bench.store.path(p.outputs["validation"].sha256)) for p in (looked, trained))
    assert torch.equal(losses["0"], before["3"]) and torch.equal(losses["base"], before["base"])
    asked = {"train_text_encoder": True, "placeholder_token": "sign", "learning_rate": 1e-3, "init_adapter": str(file)}
    longer = chain.fine_tune(chain.recipe(*SHORT, *FROM_A_FILE, *settings(**asked)), work="longer")
    after = load(chain.bench.store.read(longer.facts["sha256"]))
    moved = {key.split(".")[0] for key in ours if not torch.equal(after[key], ours[key])}
    assert after.keys() == ours.keys() and moved == {"unet", "text_encoder", "bundle_emb"}


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "holds layers of the text_encoder, which training without it would lose"),
        ({"train_text_encoder": True}, "brings the token sign, and training.placeholder_token is None"),
        (
            {"train_text_encoder": True, "placeholder_token": "disc"},
            "brings the token sign, and training.placeholder_token is 'disc'",
        ),
    ],
)
def test_what_training_on_would_lose_of_a_text_side_is_refused(chain: Chain, file: Path, asked: Any, complaint: str):
    recipe = chain.recipe(*SHORT, *FROM_A_FILE, *settings(init_adapter=str(file), **asked))
    with pytest.raises(BadInput, match=complaint):
        chain.fine_tune(recipe, work="refused")


def test_a_file_without_text_layers_is_not_gone_on_from_as_if_it_had_some(chain: Chain, file: Path):
    tensors, metadata = read_adapter(file)
    file.write_bytes(to_safetensors({key: t for key, t in tensors.items() if key.startswith("unet.")}, metadata))
    asked = settings(init_adapter=str(file), train_text_encoder=True)
    with pytest.raises(BadInput, match="holds no layers of text encoders to go on from"):
        chain.fine_tune(chain.recipe(*SHORT, *FROM_A_FILE, *asked), work="refused")


# refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"text_encoder_lr": 1e-5}, "text_encoder_lr is 1e-05, but train_text_encoder is False"),
        ({"num_vectors": 2}, "num_vectors is 2, but placeholder_token is not set"),
        ({"initializer_token": "dog"}, "initializer_token is 'dog', but placeholder_token is not set"),
        ({"token_learning_rate": 1e-3}, "token_learning_rate is 0.001, but placeholder_token is not set"),
        ({"placeholder_token": "<My Icon>"}, "expected one word in lower case, without full stops, such as '<icon>'"),
        ({"placeholder_token": "v1.5"}, "expected one word in lower case, without full stops"),
        ({"train_text_encoder": True, "adapter": "loha"}, "train_text_encoder is True, but adapter is 'loha'"),
        (
            {"train_text_encoder": True, "text_encoder_lr": 0.5, "optimizer": "prodigy", "learning_rate": 1.0},
            "text_encoder_lr is 0.5, but optimizer is 'prodigy'",
        ),
        (
            {"placeholder_token": "<x>", "token_learning_rate": 0.5, "optimizer": "muon"},
            "token_learning_rate is 0.5, but optimizer is 'muon'",
        ),
        (
            {"placeholder_token": "<x>", "optimizer": "adamwschedulefree"},
            "placeholder_token is <x>, but optimizer is 'adamwschedulefree'",
        ),
    ],
)
def test_settings_that_do_not_agree_are_refused_in_one_line(chain: Chain, asked: dict[str, Any], complaint: str):
    with pytest.raises(RecipeError, match=complaint) as refusal:
        chain.recipe(*settings(**asked))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"placeholder_token": "a"}, "the token 'a' is in the tokenizer's vocabulary"),
        ({"placeholder_token": "<x>"}, "no training caption has it"),
        (TOKEN | {"initializer_token": "abc"}, "'abc' is 3 tokens for the text_encoder, num_vectors is 2"),
    ],
)
def test_a_token_that_cannot_be_learnt_is_refused(chain: Chain, asked: dict[str, Any], complaint: str):
    with pytest.raises(BadInput, match=complaint):
        side(chain, **asked)
