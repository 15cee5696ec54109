"""Fine-tuning: stop it anywhere, resume it, twice: the same bytes as if it had never stopped."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load

from components.errors import BaseModelError, Stopped, TrainingDiverged
from components.families import family
from components.garbage import survey, sweep
from components.training import finetune
from components.training.checkpoints import MANIFEST_NAME, save_checkpoint
from components.training.worker import STAGES
from tests.chain import Chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain.build(tmp_path_factory.mktemp("chain"))
    chain.cache(chain.recipe())
    return chain


FAST = ("training.max_train_steps=12", "training.checkpointing_steps=4", "training.preview_prompts=2")


def outputs(chain: Chain, product) -> dict[str, str]:
    return {name: ref.sha256 for name, ref in product.outputs.items()}


PIVOTAL = ("training.train_text_encoder=true", "training.placeholder_token=sign", "training.num_vectors=2",
           "training.ema_decay=0.9")  # fmt: skip
STATES = ("training.max_train_steps=7", "training.checkpointing_steps=3", "training.preview_prompts=0")


class PowerCut(list):
    """Events of a training that is cut off without warning when it reports its step `after`."""

    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def append(self, event: dict) -> None:
        super().append(event)
        if "loss" in event and event["step"] == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (FAST, ()),
        (FAST, ("training.gradient_accumulation_steps=2",)),
        (FAST, ("training.lora_dropout=0.2",)),
        (FAST, ("training.train_batch_size=50",)),  # every batch crosses an epoch's end
        (STATES, ("training.optimizer=adafactor", "training.gradient_accumulation_steps=2")),
        (STATES, ("training.optimizer=prodigy", "training.learning_rate=1.0")),
        (STATES, ("training.optimizer=adamwschedulefree", "training.lr_warmup_steps=4")),
        (STATES, ("training.optimizer=lion", "training.train_batch_size=50", "training.ema_decay=0.9")),
        (STATES, ("training.optimizer=muon", "training.targets=all", "training.mixed_precision=fp16")),
        (STATES, ("training.train_text_encoder=true", "training.text_encoder_lr=1e-2", "training.optimizer=lion")),
        (STATES, (*PIVOTAL, "training.gradient_accumulation_steps=2", "training.lora_dropout=0.2")),
        (STATES, (*PIVOTAL, "training.optimizer=prodigy", "training.learning_rate=1.0")),
    ],
)
def test_a_training_stopped_and_cut_off_ends_with_the_bytes_of_an_unbroken_one(
    chain: Chain, settings: tuple[str, ...], changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    """Bytes of adapters, log, validation and previews, and of everything in the last checkpoint."""
    manifests = []

    def save_and_note(*arguments) -> Path:
        manifests.append((save_checkpoint(*arguments) / MANIFEST_NAME).read_text())
        return Path()

    monkeypatch.setattr(finetune, "save_checkpoint", save_and_note)
    recipe = chain.recipe(*settings, *changes)
    unbroken = outputs(chain, chain.fine_tune(recipe, work="unbroken"))
    last = manifests[-1]
    with pytest.raises(Stopped, match="run the same command to continue"):
        chain.fine_tune(recipe, work="broken", stop_after=2)
    with pytest.raises(KeyboardInterrupt):  # after the first checkpoint of its interval, in the middle of the next
        chain.fine_tune(recipe, work="broken", events=PowerCut(5))
    assert outputs(chain, chain.fine_tune(recipe, work="broken")) == unbroken
    assert manifests[-1] == last


def test_a_batch_that_once_did_not_fit_stays_in_halves_when_the_training_is_resumed(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
):
    """Memory runs out in the third pass of a training that starts; sums over other passes would round differently."""
    recipe, passes = chain.recipe(*STATES, *PIVOTAL), 0
    denoise = finetune._FineTuning._denoise

    def cramped(self, *arguments) -> torch.Tensor:
        nonlocal passes
        passes += torch.is_grad_enabled()
        if passes == 3 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("tried to allocate")
        return denoise(self, *arguments)

    whole = outputs(chain, chain.fine_tune(recipe, work="whole"))
    monkeypatch.setattr(finetune._FineTuning, "_denoise", cramped)
    unbroken = outputs(chain, chain.fine_tune(recipe, work="unbroken"))
    passes = 0
    with pytest.raises(Stopped):
        chain.fine_tune(recipe, work="broken", stop_after=4)
    assert outputs(chain, chain.fine_tune(recipe, work="broken")) == unbroken
    assert unbroken["adapter"] != whole["adapter"]


def test_gradient_checkpointing_keeps_fewer_activations_and_changes_no_bit(chain: Chain):
    kept: dict[str, int] = {"false": 0, "true": 0}

    def train(checkpointing: str) -> dict[str, str]:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[checkpointing] += tensor.nbytes
            return tensor

        recipe = chain.recipe(*STATES, *PIVOTAL, f"training.gradient_checkpointing={checkpointing}")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return outputs(chain, chain.fine_tune(recipe, work=checkpointing))

    assert train("true") == train("false")
    assert kept["true"] < 0.5 * kept["false"]


def test_two_processes_fine_tune_like_one_with_twofold_accumulation(chain: Chain):
    """The stage as the flow asks for it, whose second process is another worker."""
    request = {
        "stage": "fine-tune",
        "home": str(chain.bench.workspace.home),
        "key": "shared",
        "snapshot": chain.snapshot(chain.recipe()),
        "base": {"model": str(chain.base_path)},
        "training": chain.recipe(*STATES, *PIVOTAL, "training.num_processes=2").training.model_dump(mode="json"),
    }
    events: list[dict] = []
    shared = STAGES["fine-tune"](chain.bench, request, events.append)
    alone = chain.fine_tune(
        chain.recipe(*STATES, *PIVOTAL, "training.gradient_accumulation_steps=2"), work="accumulated"
    )

    def tensors(product) -> dict[str, torch.Tensor]:
        return load(chain.bench.store.read(product.outputs["adapter"].sha256))

    def losses(product) -> list[float]:
        lines = map(json.loads, chain.bench.store.read(product.outputs["log"].sha256).splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    torch.testing.assert_close(tensors(shared), tensors(alone), rtol=0, atol=1e-6)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-6)
    assert [event["step"] for event in events if "loss" in event] == list(range(1, 8))


@pytest.mark.parametrize(
    ("optimizer", "learning_rate"),
    [("adafactor", 1.0), ("prodigy", 1.0), ("adamwschedulefree", 3e-3), ("lion", 1e-3), ("muon", 1e-2)],
)
def test_every_optimizer_lowers_the_held_out_loss(chain: Chain, optimizer: str, learning_rate: float):
    product = chain.fine_tune(
        chain.recipe(
            "training.preview_prompts=0",
            "training.max_train_steps=30",
            "training.checkpointing_steps=30",
            f"training.optimizer={optimizer}",
            f"training.learning_rate={learning_rate}",
        ),
        work=optimizer,
    )
    assert [line["validation_ratio"] < 1 for line in product.facts["validation"]] == [True]


def test_schedule_free_validates_and_publishes_its_averaged_weights(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    """x = (y - (1 - beta) z) / beta, from what the last checkpoint holds."""
    kept = {}
    monkeypatch.setattr(finetune, "save_checkpoint", lambda _, step, tensors, facts: kept.update({step: tensors}))
    product = chain.fine_tune(
        chain.recipe(*STATES, "training.optimizer=adamwschedulefree", "training.learning_rate=1e-2"), work="averaged"
    )
    published = load(chain.bench.store.read(product.outputs["adapter"].sha256))
    tensors = kept[7]
    for index, (name, y) in enumerate(tensors["parameters"].items()):
        x = (y - 0.1 * tensors["optimizer"][f"{index}.z"]) / 0.9
        torch.testing.assert_close(published["unet." + name.replace(".default", "")], x)
        assert not torch.equal(x, y)


def test_training_lowers_the_held_out_loss_and_says_so_at_every_checkpoint(chain: Chain):
    events: list[dict] = []
    product = chain.fine_tune(chain.recipe("training.learning_rate=3e-3", "training.preview_prompts=0"), events=events)
    ratios = [line["validation_ratio"] for line in product.facts["validation"]]
    assert [line["step"] for line in product.facts["validation"]] == [10, 20, 30, 40]
    assert ratios[-1] < 1
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [10, 20, 30, 40]
    log = [json.loads(line) for line in chain.bench.store.read(product.outputs["log"].sha256).splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 41))


def test_the_validation_losses_are_kept_per_sample_and_time_with_the_base_beside_them(chain: Chain):
    product = chain.fine_tune(chain.recipe(*FAST), work="validation")
    losses = load(chain.bench.store.read(product.outputs["validation"].sha256))
    assert {name: tuple(tensor.shape) for name, tensor in losses.items()} == dict.fromkeys(
        ("base", "4", "8", "12"), (8, 4)
    )


def test_the_stock_pipeline_loads_the_adapter_and_draws_other_pictures_than_the_base(chain: Chain, tmp_path: Path):
    product = chain.fine_tune(
        chain.recipe("training.learning_rate=1e-2", "training.preview_prompts=0", "training.targets=all"), work="stock"
    )
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(
        chain.bench.store.read(product.outputs["adapter"].sha256)
    )
    pipeline = StableDiffusionPipeline.from_pretrained(chain.base_path)

    def draw() -> torch.Tensor:
        return torch.from_numpy(
            pipeline(
                "disc, red sign",
                num_inference_steps=2,
                height=32,
                width=32,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images
        )

    before = draw()
    pipeline.load_lora_weights(tmp_path)
    assert (draw() - before).abs().max() > 1e-3


def test_an_objective_that_contradicts_the_base_is_refused(chain: Chain):
    said = r"scheduler_config\.json: the recipe says prediction_type = 'v_prediction', but .* says 'epsilon'; set"
    with pytest.raises(BaseModelError, match=said) as refusal:
        chain.fine_tune(chain.recipe(*FAST, "training.prediction_type=v_prediction"), work="contradiction")
    assert "\n" not in str(refusal.value)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(chain: Chain):
    recipe = chain.recipe(
        *FAST, "training.learning_rate=1e30", "training.max_grad_norm=1e30", "training.preview_prompts=0"
    )
    with pytest.raises(TrainingDiverged, match="step"):
        chain.fine_tune(recipe, work="diverged")


def test_what_a_stopped_training_published_outlives_a_collection_of_garbage_and_is_young_when_it_goes_on(chain: Chain):
    recipe, store = chain.recipe(*FAST, "training.seed=5"), chain.bench.store
    with pytest.raises(Stopped):
        chain.fine_tune(recipe, work="work/collected", stop_after=4)
    (manifest,) = (chain.bench.workspace.home / "work" / "collected").glob(f"*/{MANIFEST_NAME}")
    facts = json.loads(manifest.read_text())["facts"]
    published = [ref[0] for ref in (*facts["adapters"].values(), *facts["previews"].values())]
    assert len(published) == 3  # an adapter and two previews
    for sha256 in published:
        os.utime(store.path(sha256), (0, 0))
    before = datetime(2001, 1, 1, tzinfo=UTC)
    assert sweep(chain.bench, survey(chain.bench, before)).objects == 0
    outputs(chain, chain.fine_tune(recipe, work="work/collected"))
    assert all(store.path(sha256).stat().st_mtime > before.timestamp() for sha256 in published)


def test_pictures_of_several_shapes_train_in_batches_of_one_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a base of full size: this one has no room for buckets unless they may be as small as its pictures."""
    monkeypatch.setattr(family, "MIN_SIDE", 16)
    monkeypatch.setattr(family, "BUCKET_STEP", 8)
    chain = Chain.build(tmp_path)
    for index, path in enumerate(sorted(chain.pictures.glob("*.png"))):
        if index % 3:
            size = (40, 24) if index % 3 == 1 else (24, 40)
            Image.open(path).resize(size).save(path)
    recipe = chain.recipe(*STATES, "training.train_batch_size=3", "curation.min_side=16")
    assert set(chain.cache(recipe).facts["buckets"]) == {"24x40", "32x32", "40x24"}
    unbroken = outputs(chain, chain.fine_tune(recipe, work="unbroken"))
    with pytest.raises(Stopped):
        chain.fine_tune(recipe, work="broken", stop_after=2)
    assert outputs(chain, chain.fine_tune(recipe, work="broken")) == unbroken
