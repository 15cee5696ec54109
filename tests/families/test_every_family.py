"""What every family owes: the stock pipeline's numbers while training, and an adapter that the stock pipeline loads."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from components.catalog.encodings import locate
from components.config import BaseModelConfig, EvaluationConfig, TrainingConfig, load_recipe, parse_recipe
from components.curation.manifest import SampleRow
from components.diffusion.samplers import sampler_from_scheduler
from components.errors import BadInput, BaseModelError, Stopped
from components.evaluation.generation import Request, Settings, draw_batch, open_pipeline
from components.evaluation.study import network_evaluations
from components.families.bases import BaseModel, resolve_base
from components.families.family import Framing
from components.latents.caching import cache_latents
from components.latents.encoding import pixels_of
from components.latents.keys import (
    caption_item,
    pixel_encoder_key,
    placements,
    prompt_encoder_key,
    sample_item,
    usual_sizing,
)
from components.latents.ragged import shortened, stacked
from components.latents.reading import ShardReader
from components.layouts.skeleton import skeleton_of
from components.layouts.tokens import Token, bundled
from components.stages import Bench, Product
from components.tensors import to_safetensors
from components.training.adapters import adapter_bytes, add_adapter, load_adapter
from components.training.finetune import fine_tune, objective_of
from components.training.imports import imported_adapter
from components.training.texts import TextSide, text_side
from components.workspace import Workspace
from flows.demo import RECIPE
from tests.families.members import MEMBERS, Member
from tests.families.page import CACHES, CAN, RESUMES, SAMPLERS, STOCK, TRAINS, table, ticked
from tests.pictures import COLOURS, SHAPES, draw

PROMPTS = ["disc, red sign", "a long description of a sign that no tiny tokenizer takes to its end " * 8, ""]
STEPS = 3


@dataclass
class Trial:
    """One member on disk with a few pictures, and the stages on them."""

    name: str
    member: Member
    folder: Path

    @cached_property
    def base(self) -> BaseModel:
        return resolve_base(BaseModelConfig(model=str(self.member.build(self.folder / "base"))))

    @cached_property
    def bench(self) -> Bench:
        bench = Bench.open(Workspace(self.folder / "home"))
        bench.catalog.migrate()
        return bench

    @cached_property
    def rows(self) -> list[SampleRow]:
        """Six pictures that are wider than high, so that something of each is cut off."""
        rows = []
        for i, colour in enumerate([*COLOURS, "red"]):
            side, path = self.member.side, self.folder / f"{i}.png"
            draw(SHAPES[i], colour, side).resize((2 * side, side + 8)).save(path)
            sha256 = self.bench.store.put_file(path).sha256
            text, split = f"{SHAPES[i]}, {colour} sign", "test" if i == 0 else "train"
            size = (2 * side, side + 8)
            rows.append(SampleRow(sha256, sha256, path.name, text, None, str(i), split, *size, None, None, None, 1))
        return rows

    @cached_property
    def cached(self) -> Product:
        sizing = usual_sizing(self.base, self.member.side)
        return cache_latents(self.bench, self.rows, self.base, sizing, lambda done, total: None)

    @cached_property
    def training(self) -> TrainingConfig:
        keys = {
            "rank": 2,
            "lora_alpha": 3.0,
            "learning_rate": 1e-2,
            "max_train_steps": STEPS,
            "train_batch_size": 2,
            "resolution": self.member.side,
            "checkpointing_steps": STEPS,
            "validation_times": 2,
            "preview_prompts": 1,
            "caption_dropout_rate": 0.5,
        }
        body = {"name": "x", "data": {"sources": [{"path": "."}]}, "training": keys | self.member.training}
        return parse_recipe(body, origin="the test").training

    def fine_tune(self, work: str, stop_after: int | None = None, **changes: Any) -> Product:
        assert self.cached.items
        events: list[dict[str, Any]] = []
        return fine_tune(
            self.bench,
            self.rows,
            self.base,
            TrainingConfig.model_validate(self.training.model_dump() | changes),
            self.folder / work,
            on_event=events.append,
            should_stop=lambda: stop_after is not None and sum("loss" in event for event in events) >= stop_after,
        )

    @property
    def text_settings(self) -> dict[str, Any]:
        """What trains the text side: a LoRA on its encoders and, where the stock pipeline loads any, a token."""
        learns = {"train_text_encoder": True, "text_encoder_lr": 3e-3}
        if self.member.tokens:
            learns |= {"placeholder_token": "sign", "num_vectors": 2, "initializer_token": "a", "ema_decay": 0.9}
        return learns

    @cached_property
    def trained(self) -> Product:
        return self.fine_tune("unbroken")

    @cached_property
    def untouched(self) -> Any:
        """The stock pipeline, for tests that leave it as it is."""
        return self.stock()

    def stock(self) -> Any:
        return self.base.architecture.load_pipeline(self.base.path, "cpu", torch.float32)

    def step(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Noisy latents (2, C, h, w) at two times, and what they are conditioned on."""
        family, path, side = self.base.architecture, self.base.path, self.member.side
        geometry, framing = family.geometry(path), Framing((side, side), (0, 0), (side, side))
        cond = family.load_prompt_encoder(path, "cpu").encode(PROMPTS[:2])
        cond = {name: tensor.clone() for name, tensor in cond.items()}  # autograd takes no tensor of inference mode
        cells = side // geometry.downscale
        x_t = torch.randn(2, geometry.channels, cells, cells, generator=torch.Generator().manual_seed(0))
        return x_t, torch.tensor([100.0, 700.0]), cond | stacked([family.sample_condition(framing)] * 2)

    def ask(self, pipeline: Any, prompts: list[str], **options: Any) -> Any:
        """What the stock pipeline draws, in one step unless `options` say otherwise, without a second pass."""
        return pipeline(
            prompt=prompts,
            height=self.member.side,
            width=self.member.side,
            generator=torch.Generator().manual_seed(0),
            **self.base.architecture.generation_options(pipeline, 1.0, len(prompts)),
            **({"num_inference_steps": 1, "output_type": "latent"} | options),
        ).images


@pytest.fixture(scope="module", params=MEMBERS)
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(request.param, MEMBERS[request.param], tmp_path_factory.mktemp(request.param))


def test_prompt_embeddings_are_those_of_the_stock_pipeline(trial: Trial):
    family, base = trial.base.architecture, trial.base.path
    ours = family.load_prompt_encoder(base, "cpu").encode(PROMPTS)
    with torch.no_grad():
        stock = trial.member.encode_prompt(trial.untouched, list(PROMPTS))
    assert ours.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.equal(ours[name], tensor), name


def test_cached_embeddings_are_those_of_the_encoder_in_the_familys_precision(trial: Trial):
    family, base, captions = trial.base.architecture, trial.base, [row.text for row in trial.rows[:3]]
    assert trial.cached.facts["encoded_captions"] == len(trial.rows) + 1
    keys = [caption_item(caption).key for caption in captions]
    places = locate(trial.bench.catalog, prompt_encoder_key(base), keys)
    cached = ShardReader(trial.bench.store, places)(keys)
    exact = shortened(family.load_prompt_encoder(base.path, "cpu").encode(captions))
    tolerance = 1e-6 if family.precision == "float32" else 2**-8
    for name, tensor in exact.items():
        assert cached[name].dtype == (getattr(torch, family.precision) if tensor.is_floating_point() else tensor.dtype)
        torch.testing.assert_close(cached[name].to(tensor), tensor, rtol=tolerance, atol=1e-6)
    picture = [sample_item(trial.rows[0], *placements(trial.rows[0], usual_sizing(base, trial.member.side))).key]
    latents = ShardReader(trial.bench.store, locate(trial.bench.catalog, pixel_encoder_key(base), picture))(picture)
    assert {tensor.dtype for tensor in latents.values()} == {torch.float16}
    kept = " and ".join(f"`{name}`" for name in sorted(latents, reverse=True))
    assert table(CAN)[trial.name][CACHES] == f"{kept}; text in {family.precision}"


def test_the_stock_pipeline_decodes_our_latents_as_what_its_autoencoder_encoded(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
):
    """Scaling, shift and packing, undone by the stock pipeline: what reaches its decoder is the encoder's own mean."""
    family, base, pipeline = trial.base.architecture, trial.base, trial.untouched
    sizing = usual_sizing(base, trial.member.side)
    pixels = pixels_of(trial.bench.store, [sample_item(row, *placements(row, sizing)) for row in trial.rows[:2]])
    encoded = family.load_pixel_encoder(base.path, "cpu").encode(pixels)
    latents = family.scaled_latents(base.path)(encoded, torch.zeros)
    assert latents.shape[1] == family.geometry(base.path).channels
    seen: list[Tensor] = []
    decode = pipeline.vae.decode

    def note(z: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(z)
        return decode(z, *args, **options)

    monkeypatch.setattr(pipeline.vae, "decode", note)
    final = {"latents": trial.member.pack(pipeline, latents)}
    trial.ask(pipeline, PROMPTS[:2], output_type="pt", callback_on_step_end=lambda *args: final)
    posterior = trial.member.encode_pixels(pipeline, pixels)
    torch.testing.assert_close(seen[0], posterior, rtol=1e-5, atol=1e-5)


def test_the_packaged_recipes_suit_a_base_of_their_family(trial: Trial):
    """Prediction, weighting and shift agree with its scheduler, and the preset names layers that it has."""
    family, base = trial.base.architecture, trial.base
    for name in trial.member.recipes:
        training = load_recipe(RECIPE.parent / f"{name}.toml").training
        assert objective_of(base, training).prediction.name in ("epsilon", "v_prediction", "flow_prediction")
        narrow = TrainingConfig.model_validate(training.model_dump() | {"rank": 2})  # as the layers here are
        assert add_adapter(family.load_denoiser(base.path, "cpu"), family, narrow)


def test_every_packaged_recipe_has_a_family_here():
    covered = [name for member in MEMBERS.values() for name in member.recipes]
    assert sorted([*covered, RECIPE.stem]) == sorted(path.stem for path in RECIPE.parent.glob("*.toml"))


def calls_of(module: Any, run: Callable[[], Any]) -> list[tuple[dict[str, Any], Tensor]]:
    """Arguments by name, without those left at their defaults, and the output of every call of `module`."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    names = [name for name in parameters if name != "self"]

    def record(module: Any, args: Any, options: Any, output: Any) -> None:
        given = dict(zip(names, args, strict=False)) | options
        kept = {name: v for name, v in flat(given).items() if v is not None and name != "return_dict"}
        calls.append((kept, torch.stack(output[0]) if isinstance(output[0], list) else output[0]))

    with module.register_forward_hook(record, with_kwargs=True), torch.no_grad():
        run()
    return calls


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """With the entries of dicts, and of lists of tensors, as values of their own, and tensors of one shape stacked."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        entries = value
        if isinstance(value, list) and isinstance(value[0], Tensor):
            alike = all(item.shape == value[0].shape for item in value)
            entries = torch.stack(value) if alike else dict(enumerate(value))
        if isinstance(entries, dict):
            result |= {f"{name}.{key}": item for key, item in entries.items()}
        else:
            result[name] = entries
    return result


def test_a_step_hands_the_denoiser_what_the_stock_pipeline_hands_it(trial: Trial):
    family, base, pipeline, side = trial.base.architecture, trial.base, trial.untouched, trial.member.side
    denoiser, times, prompts = getattr(pipeline, family.denoiser_part), [], PROMPTS[:2]

    def note(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        times.append(timestep)
        return {}

    ((theirs, expected),) = calls_of(
        denoiser, lambda: trial.ask(pipeline, list(prompts), callback_on_step_end=note)
    )
    framing = Framing((side, side), (0, 0), (side, side))
    cond = family.load_prompt_encoder(base.path, "cpu").encode(prompts)
    cond |= stacked([family.sample_condition(framing)] * len(prompts))
    x_t = trial.member.unpack(pipeline, theirs[trial.member.x_t], side)
    timestep = times[0].expand(len(prompts))
    results: list[Tensor] = []
    ((ours, output),) = calls_of(denoiser, lambda: results.append(family.denoise(denoiser, x_t, timestep, cond)))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        stock = torch.as_tensor(value)
        torch.testing.assert_close(torch.as_tensor(ours[name]), stock.expand_as(torch.as_tensor(ours[name])), msg=name)
    assert torch.equal(output, expected)
    torch.testing.assert_close(results[0], trial.member.sign * trial.member.unpack(pipeline, expected, side))


def test_activations_that_are_computed_again_change_no_gradient(trial: Trial):
    family, base = trial.base.architecture, trial.base
    x_t, t, cond = trial.step()
    gradients = []
    for again in (False, True):
        denoiser: Any = family.load_denoiser(base.path, "cpu").train()
        parameters = add_adapter(denoiser, family, TrainingConfig(targets="all"))
        if again:
            denoiser.enable_gradient_checkpointing()
        family.denoise(denoiser, x_t, t, cond).square().mean().backward()
        gradients.append([parameter.grad for _, parameter in parameters])
    assert all(torch.equal(once, twice) for once, twice in zip(*gradients, strict=True))


def test_a_frozen_base_in_half_precision_trains_a_float32_adapter_and_draws_with_it(trial: Trial):
    """What a GPU does, on the CPU: bfloat16 weights under autocast say nearly what the float32 ones say."""
    family, base, said = trial.base.architecture, trial.base, []
    x_t, t, cond = trial.step()
    for dtype in (torch.float32, torch.bfloat16):
        denoiser = family.load_denoiser(base.path, "cpu", dtype)
        parameters = add_adapter(denoiser, family, TrainingConfig(targets="all"))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            prediction = family.denoise(denoiser, x_t, t, cond).float()
        prediction.square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for _, p in parameters)
        said.append(prediction.detach())
    assert (said[1] - said[0]).norm() < 0.03 * said[0].norm()
    assert torch.isfinite(trial.ask(family.load_pipeline(base.path, "cpu", dtype, denoiser), PROMPTS[:1])).all()


@pytest.mark.parametrize("preset", ["attention-mlp", "all"])
def test_the_stock_pipeline_computes_with_the_adapter_what_the_trained_denoiser_does(
    trial: Trial, preset: str, tmp_path: Path
):
    family, base = trial.base.architecture, trial.base
    trained = family.load_denoiser(base.path, "cpu")
    settings = TrainingConfig.model_validate({"targets": preset, "rank": 2, "lora_alpha": 5})
    parameters = add_adapter(trained, family, settings)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(adapter_bytes(trained, family))
    pipeline = trial.stock()
    denoiser = getattr(pipeline, family.denoiser_part)
    ((arguments, before),) = calls_of(denoiser, lambda: trial.ask(pipeline, PROMPTS[:2]))
    pipeline.load_lora_weights(tmp_path)
    ((_, stock),) = calls_of(denoiser, lambda: trial.ask(pipeline, PROMPTS[:2]))
    assert arguments and (stock - before).abs().max() > 1e-3
    given = family.load_pipeline(base.path, "cpu", torch.float32, trained.eval())
    ((_, ours),) = calls_of(trained, lambda: trial.ask(given, PROMPTS[:2]))
    torch.testing.assert_close(stock, ours, rtol=1e-5, atol=1e-5)


def test_every_named_sampler_draws_with_the_stock_pipeline_or_is_refused_with_those_that_do(trial: Trial):
    family, pipeline = trial.base.architecture, trial.untouched
    own, config, drawing, refused = pipeline.scheduler, pipeline.scheduler.config, [], {}
    for name in get_args(EvaluationConfig.model_fields["scheduler"].annotation):
        try:
            pipeline.scheduler = sampler_from_scheduler(name, config, unfit=family.unfit_samplers(config))
        except BaseModelError as refusal:
            refused[name] = str(refusal)
            continue
        assert torch.isfinite(trial.ask(pipeline, PROMPTS[:1], num_inference_steps=2)).all(), name
        assert network_evaluations(trial.base, name, 2) in (2, 3)  # Heun's method asks twice but in the last
        drawing.append(name)
    pipeline.scheduler = own
    assert len(drawing) >= 2
    for said in refused.values():
        assert "\n" not in said and set(drawing) <= set(said.partition("expected ")[2].split(", "))
    assert table(SAMPLERS)[trial.name] == [ticked([name for name in drawing if name != "auto"])]


def test_what_was_cached_and_trained_is_drawn_by_the_stock_pipeline_as_other_pictures(trial: Trial, tmp_path: Path):
    product = trial.trained
    assert product.facts["final_step"] == STEPS and "preview-3-0" in product.outputs
    data = trial.bench.store.read(product.outputs["adapter"].sha256)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(data)
    pipeline = trial.stock()
    before = trial.ask(pipeline, PROMPTS[:1], output_type="pt")
    pipeline.load_lora_weights(tmp_path)
    after = trial.ask(pipeline, PROMPTS[:1], output_type="pt")
    assert before.shape[-2:] == after.shape[-2:] == (trial.member.side, trial.member.side)
    assert torch.isfinite(after).all() and (after - before).abs().max() > 1e-4
    ours = open_pipeline(trial.bench.store, trial.base, product.outputs["adapter"].sha256, "auto")
    request = Request(0, PROMPTS[0], None, seed=0)
    (image,) = draw_batch(ours, [request], Settings(1, 1.0, "auto", trial.member.side, 1, torch.get_num_threads()))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    torch.testing.assert_close(pixels, after[0].cpu(), atol=1 / 255, rtol=0)
    recipes = [f"`{objective_of(trial.base, trial.training).prediction.name}`", ticked(list(trial.member.recipes))]
    assert table(CAN)[trial.name][TRAINS] == "; ".join(filter(None, recipes))
    assert table(CAN)[trial.name][STOCK] == f"`{type(pipeline).__name__}`"


def test_a_training_that_was_stopped_ends_with_the_bytes_of_an_unbroken_one(trial: Trial):
    with pytest.raises(Stopped):
        trial.fine_tune("broken", stop_after=1)
    broken = trial.fine_tune("broken").outputs
    assert {name: ref.sha256 for name, ref in broken.items()} == {
        name: ref.sha256 for name, ref in trial.trained.outputs.items()
    }
    assert table(CAN)[trial.name][RESUMES] == "to the byte"


def test_the_page_has_a_row_for_every_family_and_no_empty_cell():
    for section, cells in ((CAN, 6), (SAMPLERS, 1)):
        rows = table(section)
        assert list(rows) == list(MEMBERS)
        assert all(len(row) == cells and all(row) for row in rows.values())


# the text side --------------------------------------------------------------------------------------------------------


CLIP = pytest.mark.parametrize("trial", ["sd1", "sdxl", "sd3", "flux1-dev"], indirect=True)  # one of each kind
EIGHT = [f"{shape}, {colour} sign" for shape in SHAPES[:4] for colour in ("red", "blue")]  # the cache's micro-batch


def text_of(trial: Trial, **changes: Any) -> TextSide:
    training = TrainingConfig.model_validate(trial.training.model_dump() | trial.text_settings | changes)
    text = text_side(trial.base, training, "cpu", torch.float32, EIGHT)
    assert text is not None
    return text


@CLIP
@pytest.mark.parametrize("again", [False, True], ids=["kept activations", "computed again"])
def test_prompts_are_encoded_with_gradients_as_they_are_cached_tensor_for_tensor(trial: Trial, again: bool):
    cached = trial.base.architecture.load_prompt_encoder(trial.base.path, "cpu").encode(EIGHT)
    cached = {name: tensor.clone() for name, tensor in cached.items()}
    text = text_of(trial, placeholder_token=None, num_vectors=1, initializer_token=None, gradient_checkpointing=again)
    text.train(True)
    live = text.condition(EIGHT, cached)
    assert live.keys() == cached.keys()
    for name, tensor in cached.items():
        assert torch.equal(live[name], tensor), name
    sum(tensor.square().mean() for tensor in live.values()).backward()
    ups = [parameter for name, parameter in text.parameters if "lora_B" in name and parameter.grad is not None]
    assert ups and all(parameter.grad.abs().max() > 0 for parameter in ups)


@CLIP
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_the_stock_pipeline_reads_prompts_as_the_trained_text_encoders_do(trial: Trial, kind: str):
    """With the files' LoRA and token, tensor for tensor; alpha is not the rank."""
    family, base, text = trial.base.architecture, trial.base.path, text_of(trial, adapter=kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in text.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    denoiser = family.load_denoiser(base, "cpu")
    add_adapter(denoiser, family, trial.training)
    before = family.load_prompt_encoder(base, "cpu").encode(PROMPTS)
    with torch.no_grad():
        trained = text.condition(PROMPTS, before)
    pipeline = trial.stock()
    load_adapter(pipeline, adapter_bytes(denoiser, family, text.adapted, text.tokens), family, base)
    with torch.no_grad():
        stock = trial.member.encode_prompt(pipeline, list(PROMPTS))
    for name, tensor in stock.items():
        assert torch.equal(trained[name], tensor), name
    assert max((stock[name] - before[name]).abs().max().item() for name in stock) > 1e-2


@CLIP
def test_text_encoders_in_half_precision_learn_in_float32_and_the_preview_draws_with_them(trial: Trial):
    """What a GPU does, on the CPU: bfloat16 weights under autocast, and a pipeline that is bfloat16 throughout."""
    family, base = trial.base.architecture, trial.base
    training = TrainingConfig.model_validate(trial.training.model_dump() | trial.text_settings)
    cached = family.load_prompt_encoder(base.path, "cpu").encode(EIGHT)
    text = text_side(base, training, "cpu", torch.bfloat16, EIGHT)
    assert text is not None
    with torch.autocast("cpu", torch.bfloat16):
        told = text.condition(EIGHT, {name: tensor.clone() for name, tensor in cached.items()})
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in told.values())
    sum(tensor.square().mean() for tensor in told.values()).backward()
    grads = [parameter.grad for _, parameter in text.parameters if parameter.grad is not None]
    assert grads and all(grad.dtype == torch.float32 for grad in grads)
    denoiser = family.load_denoiser(base.path, "cpu", torch.bfloat16)
    pipeline = family.load_pipeline(base.path, "cpu", torch.bfloat16, denoiser, **text.pipeline_parts)
    assert torch.isfinite(trial.ask(pipeline, PROMPTS[:1])).all()


@pytest.mark.parametrize("trial", ["sd1", "sdxl"], indirect=True)
def test_a_kohya_file_of_another_program_brings_its_text_encoders_and_embeddings(trial: Trial, tmp_path: Path):
    """With each layer's own rank and alpha: prompts are read with the base's weights plus the update."""
    base, bones, clips = trial.base, skeleton_of(trial.base), trial.base.architecture.clip_parts
    names = {part: f"lora_te{place if len(clips) > 1 else ''}_text_model_encoder_layers_" for place, part in
             enumerate(clips, 1)}  # fmt: skip
    generator, tensors = torch.Generator().manual_seed(3), {}
    layers = (("0.self_attn.q_proj", 2, 1.0), ("0.self_attn.out_proj", 4, 1.0), ("0.mlp.fc1", 4, 4.0))
    for name in names.values():
        for module, rank, alpha in ((layer.replace(".", "_"), *rest) for layer, *rest in layers):
            out = 32 if module.endswith("fc1") else 16
            tensors |= {f"{name}{module}.lora_down.weight": torch.randn(rank, 16, generator=generator),
                        f"{name}{module}.lora_up.weight": torch.randn(out, rank, generator=generator),
                        f"{name}{module}.alpha": torch.tensor(alpha)}  # fmt: skip
    unet = next(path for path in bones.shapes["unet"] if path.endswith("attn1.to_q"))
    width = bones.shapes["unet"][unet][0]
    tensors |= {f"lora_unet_{unet.replace('.', '_')}.lora_down.weight": torch.zeros(1, width),
                f"lora_unet_{unet.replace('.', '_')}.lora_up.weight": torch.zeros(width, 1)}  # fmt: skip
    token = Token("<x>", {part: torch.randn(2, 16, generator=generator) for part in clips})
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(to_safetensors(tensors | bundled([token], base.family)))
    data, facts = imported_adapter(path, base)
    assert facts["kinds"] == {"LoRA": 3 * len(clips) + 1}
    prompts, pipeline, merged = ["a <x>, red sign"], trial.stock(), trial.stock()
    load_adapter(pipeline, data, base.architecture, base.path)
    load_adapter(merged, to_safetensors(bundled([token], base.family)), base.architecture, base.path)
    for part, name in names.items():
        model = getattr(merged, part)
        for module, rank, alpha in layers:
            key = f"{name}{module.replace('.', '_')}"
            layer = next(layer for found, layer in model.named_modules() if found.endswith(f"layers.{module}"))
            layer.weight.data += alpha / rank * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    with torch.no_grad():
        theirs, ours = (trial.member.encode_prompt(stock, list(prompts)) for stock in (merged, pipeline))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-4)


@CLIP
def test_a_training_of_the_text_side_that_was_stopped_ends_with_the_bytes_of_an_unbroken_one(trial: Trial):
    unbroken = trial.fine_tune("text unbroken", **trial.text_settings)
    with pytest.raises(Stopped):
        trial.fine_tune("text broken", stop_after=2, **trial.text_settings)
    broken = trial.fine_tune("text broken", **trial.text_settings)
    assert {name: ref.sha256 for name, ref in broken.outputs.items()} == {
        name: ref.sha256 for name, ref in unbroken.outputs.items()
    }
    assert unbroken.outputs["adapter"].sha256 != trial.trained.outputs["adapter"].sha256


def test_text_encoders_that_are_no_clip_and_tokens_that_the_stock_pipeline_cannot_load_are_refused(trial: Trial):
    family = trial.base.architecture
    assert bool(family.clip_parts) == trial.member.clip
    refused = {"placeholder_token": ("<x>", "loads no learned tokens")} if not trial.member.tokens else {}
    if not trial.member.clip:
        refused = {"train_text_encoder": (True, "language model"), "placeholder_token": ("<x>", "language model")}
    for key, (value, complaint) in refused.items():
        with pytest.raises(BadInput, match=complaint):
            text_side(trial.base, TrainingConfig.model_validate({key: value}), "cpu", torch.float32, ["a <x>"])
