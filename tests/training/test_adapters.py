"""Every kind of adapter by every route: trained, stopped and resumed, filed, loaded by the stock pipeline, merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load
from torch import Tensor

from components.config import BaseModelConfig, TrainingConfig
from components.errors import BadInput, RecipeError, Stopped
from components.families.bases import BaseModel, resolve_base
from components.layouts.reading import layers_of, stored_layers
from components.layouts.skeleton import skeleton_of
from components.layouts.writing import kohya_tensors
from components.training.adapters import (
    ADAPTER_FILE,
    KINDS,
    adapter_bytes,
    add_adapter,
    attach_adapter,
    limit_norms,
    load_adapter,
    stock_adapter,
)
from components.training.ema import ExponentialAverage
from components.training.loop import set_learning_rate
from components.training.optimizers import OPTIMIZERS
from tests.chain import Chain
from tests.tiny import tiny_stable_diffusion

REFUSAL = "Invalid LoRA checkpoint. Make sure all LoRA param names contain `'lora'` substring."
WIDEST = {"pissa": "attention-mlp", "oft": "all-linear"}  # the others take convolutions too
ROUND_OFF = 1e-5
TINY = (
    "training.max_train_steps=3",
    "training.checkpointing_steps=3",
    "training.train_batch_size=2",
    "training.validation_items=2",
    "training.validation_times=1",
    "training.preview_prompts=0",
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain.build(tmp_path_factory.mktemp("chain"))
    chain.cache(chain.recipe())
    return chain


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return resolve_base(BaseModelConfig(model=str(tiny_stable_diffusion(tmp_path_factory.mktemp("base")))))


def settings(kind: str, **changes: Any) -> TrainingConfig:
    scale = {} if kind == "oft" else {"lora_alpha": 3.0}  # not the rank: a reader that takes it for the rank is off
    return TrainingConfig.model_validate(
        {"adapter": kind, "rank": 4, "targets": WIDEST.get(kind, "all"), **scale, **changes}
    )


def trained(base: BaseModel, training: TrainingConfig) -> Any:
    """A denoiser whose adapter has been moved away from where it starts, as training does."""
    denoiser: Any = base.architecture.load_denoiser(base.path, "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in add_adapter(denoiser, base.architecture, training):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return denoiser.eval()


def output(denoiser: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 16, generator=generator)
    with torch.no_grad():
        return denoiser(x, torch.tensor([3, 500]), context)[0]


def fresh(base: BaseModel) -> Any:
    return base.architecture.load_denoiser(base.path, "cpu").eval()  # type: ignore[no-any-return]


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# kind x route -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_the_base(base: BaseModel, kind: str):
    denoiser = fresh(base)
    add_adapter(denoiser, base.architecture, settings(kind))
    assert differ(output(denoiser.eval()), output(fresh(base))) < ROUND_OFF


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_of_every_kind_ends_with_the_bytes_of_an_unbroken_one(chain: Chain, kind: str):
    assert_stopping_changes_nothing(chain, f"training.adapter={kind}", "training.lora_alpha=16")


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_gives_the_trained_model_back(base: BaseModel, kind: str):
    denoiser = trained(base, settings(kind))
    again = fresh(base)
    attach_adapter(again, base.architecture, adapter_bytes(denoiser, base.architecture))
    assert differ(output(denoiser), output(fresh(base))) > 1e-2
    if kind == "pissa":  # it trained on W - s B0 A0 and is filed for W
        assert differ(output(again.eval()), output(denoiser)) < ROUND_OFF
    else:
        assert torch.equal(output(again.eval()), output(denoiser))


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_loader_agrees_or_refuses_and_then_agrees_with_the_spelled_out_file(
    base: BaseModel, kind: str, tmp_path: Path
):
    family, denoiser = base.architecture, trained(base, settings(kind))
    data = adapter_bytes(denoiser, family)
    (tmp_path / ADAPTER_FILE).write_bytes(data)
    pipeline = family.load_pipeline(base.path, "cpu", torch.float32)
    if kind in ("loha", "lokr", "oft"):
        with pytest.raises(ValueError, match=REFUSAL):
            pipeline.load_lora_weights(tmp_path)
        assert stock_adapter(data, family, base.path) != data
    else:
        assert stock_adapter(data, family, base.path) == data
    load_adapter(pipeline, data, family, base.path)
    assert differ(output(pipeline.unet), output(denoiser)) < ROUND_OFF


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_the_weights_it_computes_the_same(base: BaseModel, kind: str):
    denoiser = trained(base, settings(kind))
    expected = output(denoiser)
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(adapter_names=["default"])
    assert differ(output(denoiser), expected) < ROUND_OFF


@pytest.mark.parametrize("kind", KINDS)
def test_kohyas_layout_holds_the_same_update_or_is_said_not_to_exist(base: BaseModel, kind: str):
    data = adapter_bytes(trained(base, settings(kind)), base.architecture)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    if kind == "oft":
        with pytest.raises(BadInput, match="OFT has no file layout"):
            stored_layers(load(data), header)
        return
    layers = {layer.name: layer for layer in stored_layers(load(data), header)}
    skeleton = skeleton_of(base)
    written = kohya_tensors(list(layers.values()), skeleton)
    read = layers_of(written, {}, skeleton, "the file")
    assert {layer.name for layer in read} == set(layers)
    for layer in read:
        assert torch.allclose(layer.delta(), layers[layer.name].delta(), atol=1e-6)
        magnitude = layers[layer.name].magnitude
        assert (layer.magnitude is None) == (magnitude is None) == (kind != "dora")
        assert magnitude is None or torch.equal(layer.magnitude.flatten(), magnitude.flatten())  # type: ignore[union-attr]


def test_a_file_of_the_same_adapter_always_has_the_same_bytes(base: BaseModel):
    for kind in ("pissa", "oft"):
        first, second = (adapter_bytes(trained(base, settings(kind)), base.architecture) for _ in range(2))
        assert first == second
        spelled = [stock_adapter(first, base.architecture, base.path) for _ in range(2)]
        assert spelled[0] == spelled[1]


# settings of the factors --------------------------------------------------------------------------------------------


def test_patterns_decide_rank_and_scale_of_their_layers_and_reach_the_stock_loader(base: BaseModel, tmp_path: Path):
    training = settings(
        "lora", targets=["to_q", "to_k", "ff.net.2"], rank_pattern={"to_k": 8}, alpha_pattern={"ff.net.2": 1.0}
    )
    denoiser = trained(base, training)
    data = adapter_bytes(denoiser, base.architecture)
    ranks = {key.split(".lora_A")[0].rsplit(".", 1)[-1]: len(t) for key, t in load(data).items() if "lora_A" in key}
    assert ranks == {"to_q": 4, "to_k": 8, "2": 4}
    scales = {
        name.rsplit(".", 1)[-1]: m.scaling["default"]
        for name, m in denoiser.named_modules()
        if isinstance(m, BaseTunerLayer)
    }
    assert scales == {"to_q": 3 / 4, "to_k": 3 / 8, "2": 1 / 4}
    pipeline = base.architecture.load_pipeline(base.path, "cpu", torch.float32)
    load_adapter(pipeline, data, base.architecture, base.path)
    assert torch.equal(output(pipeline.unet), output(denoiser))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "adamwschedulefree"])
def test_loraplus_trains_the_factor_that_starts_at_zero_faster_and_nothing_else(base: BaseModel, optimizer: str):
    denoiser = fresh(base)
    parameters = add_adapter(denoiser, base.architecture, settings("dora"))
    training = settings("dora", loraplus_lr_ratio=16.0, optimizer=optimizer)
    built = OPTIMIZERS[optimizer](parameters, training)
    set_learning_rate(built, 1e-3)
    names = {id(parameter): name for name, parameter in parameters}
    rates = {names[id(parameter)]: group["lr"] for group in built.param_groups for parameter in group["params"]}
    assert rates == {name: 16e-3 if "lora_B" in name else 1e-3 for name, _ in parameters}


def test_a_limited_norm_is_met_exactly_and_shorter_updates_are_left_alone(base: BaseModel):
    denoiser = trained(base, settings("rslora"))

    def norms() -> dict[str, float]:
        return {
            name: module.get_delta_weight("default").norm().item()
            for name, module in denoiser.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    before = norms()
    limit = sorted(before.values())[len(before) // 2]
    limit_norms(denoiser, limit)
    for name, norm in norms().items():
        assert norm == pytest.approx(min(before[name], limit), rel=1e-5)


def test_the_published_adapter_is_the_average_and_the_checkpoint_has_both(chain: Chain):
    """The average is recomputed here from the adapters of every step of a run without it."""
    steps = (*TINY, "training.max_train_steps=4", "training.checkpointing_steps=1")
    plain = chain.fine_tune(chain.recipe(*steps), work="plain")
    averaged = chain.fine_tune(chain.recipe(*steps, "training.ema_decay=0.5"), work="averaged")

    def adapter(product: Any, step: int) -> dict[str, Tensor]:
        return load(chain.bench.store.read(product.outputs[f"adapter-{step}"].sha256))

    denoiser: Any = fresh(chain.base())
    add_adapter(denoiser, chain.base().architecture, chain.recipe(*steps).training)
    start = load(adapter_bytes(denoiser, chain.base().architecture))
    expected = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    average = ExponentialAverage(expected.items(), 0.5)
    for step in range(4):
        for name, tensor in adapter(plain, step + 1).items():
            expected[name].data.copy_(tensor)
        average.update(step)
    found = adapter(averaged, 4)
    assert all(torch.equal(found[name], average.tensors[name]) for name in expected)
    assert any(not torch.equal(found[name], tensor) for name, tensor in adapter(plain, 4).items())


@pytest.mark.parametrize(
    "changes",
    [
        ("training.ema_decay=0.9",),
        ("training.loraplus_lr_ratio=8", 'training.targets=["to_q", "to_v"]'),
        ("training.scale_weight_norms=0.02", "training.rank_pattern={to_k = 2}"),
    ],
)
def test_what_shapes_the_training_survives_a_stop(chain: Chain, changes: tuple[str, ...]):
    assert_stopping_changes_nothing(chain, *changes)


def assert_stopping_changes_nothing(chain: Chain, *changes: str) -> None:
    recipe = chain.recipe(*TINY, *changes)
    unbroken = chain.fine_tune(recipe, work="unbroken")
    with pytest.raises(Stopped):
        chain.fine_tune(recipe, work="broken", stop_after=1)
    assert chain.fine_tune(recipe, work="broken").outputs == unbroken.outputs


# bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (settings("lora", rank=512), r"rank is 512, but the widest layer it goes to, .*, has 32; choose a smaller"),
        (settings("lora", targets=["to_qq"]), r"'to_qq' is the end of no layer's name; did you mean 'to_q'\?"),
        (settings("pissa", targets="all"), "'pissa' cannot go to conv_in, a convolution of kernel 3"),
        (settings("oft", targets="all"), "'oft' cannot go to conv_in"),
        (settings("lora", rank_pattern={"to_z": 2}), "rank_pattern: 'to_z' decides no layer"),
        (settings("lora", rank_pattern={"conv_out": 8}), "rank_pattern: 'conv_out' is 8, but conv_out has 4"),
        (settings("lora", alpha_pattern={".*": 1, "to_q": 2}), "alpha_pattern: 'to_q' decides no layer"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused_in_one_line(
    base: BaseModel, training: TrainingConfig, said: str
):
    with pytest.raises(BadInput, match=said) as refusal:
        add_adapter(fresh(base), base.architecture, training)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("adapter=lorra",), "adapter"),
        (("targets=atention",), "no such preset, did you mean 'attention'"),
        (("targets=[]",), "an empty list"),
        (("adapter=oft", "lora_alpha=4"), "lora_alpha is 4.0, but adapter is 'oft'"),
        (("adapter=loha", "lora_dropout=0.1"), "lora_dropout is 0.1, but adapter is 'loha'"),
        (("adapter=lokr", "loraplus_lr_ratio=4"), "loraplus_lr_ratio is 4.0, but adapter is 'lokr'"),
        (("adapter=dora", "scale_weight_norms=1"), "scale_weight_norms is 1.0, but adapter is 'dora'"),
        (("loraplus_lr_ratio=4", "optimizer=muon"), "loraplus_lr_ratio is 4.0, but optimizer is 'muon'"),
        (("ema_decay=0.9", "optimizer=adamwschedulefree"), "ema_decay is 0.9, but optimizer is 'adamwschedulefree'"),
        (("rank_pattern={to_q=0}",), "greater than 0"),
        (('rank_pattern={"to_[q"=1}',), "no regular expression"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(chain: Chain, changes: tuple[str, ...], said: str):
    with pytest.raises(RecipeError, match=said) as refusal:
        chain.recipe(*(f"training.{change}" for change in changes))
    assert "\n" not in str(refusal.value)


def test_a_file_of_no_known_kind_or_of_another_base_is_refused(base: BaseModel, tmp_path: Path):
    data = adapter_bytes(trained(base, settings("loha")), base.architecture)
    other = data.replace(b"LOHA", b"BONE")
    with pytest.raises(BadInput, match="peft_type 'BONE' for unet, expected one of LOHA"):
        attach_adapter(fresh(base), base.architecture, other)
    renamed = data.replace(b"down_blocks.0", b"down_blocks.7")
    with pytest.raises(BadInput, match="does not fit this base"):
        attach_adapter(fresh(base), base.architecture, renamed)


def test_a_spelled_out_file_names_its_kind(base: BaseModel):
    data = stock_adapter(
        adapter_bytes(trained(base, settings("lokr")), base.architecture), base.architecture, base.path
    )
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["safelight.spelled_out_from"] == "LOKR"


def test_the_documentation_has_a_row_for_every_kind_and_no_empty_cell():
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    table = [line for line in text.split("## Settings")[0].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0].strip("`") for row in cells] == list(KINDS)
    assert all(cell for row in cells for cell in row)
    assert REFUSAL.split("(", maxsplit=1)[0].split(".", maxsplit=1)[0] in text
    refused = [row[0].strip("`") for row in cells if row[4] == "refused"]
    assert refused == ["loha", "lokr", "oft"]
