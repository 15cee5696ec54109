"""Fine-tuning: stop it anywhere, resume it, twice: the same bytes as if it had never stopped."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load

from components.errors import BaseModelError, Stopped, TrainingDiverged
from tests.chain import Chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain.build(tmp_path_factory.mktemp("chain"))
    chain.cache(chain.recipe())
    return chain


FAST = ("training.max_train_steps=12", "training.checkpointing_steps=4", "training.preview_prompts=2")


def outputs(chain: Chain, product) -> dict[str, str]:
    return {name: ref.sha256 for name, ref in product.outputs.items()}


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("training.gradient_accumulation_steps=2",),
        ("training.lora_dropout=0.2",),
        ("training.train_batch_size=50",),  # every batch crosses an epoch's end
    ],
)
def test_a_training_stopped_twice_ends_with_the_bytes_of_an_unbroken_one(chain: Chain, changes: tuple[str, ...]):
    recipe = chain.recipe(*FAST, *changes)
    unbroken = outputs(chain, chain.fine_tune(recipe, work="unbroken"))
    for stop in (3, 5):
        with pytest.raises(Stopped, match="run the same command to continue"):
            chain.fine_tune(recipe, work="broken", stop_after=stop)
    assert outputs(chain, chain.fine_tune(recipe, work="broken")) == unbroken


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
    with pytest.raises(BaseModelError):
        chain.fine_tune(chain.recipe(*FAST, "training.prediction_type=v_prediction"), work="contradiction")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(chain: Chain):
    recipe = chain.recipe(
        *FAST, "training.learning_rate=1e30", "training.max_grad_norm=1e30", "training.preview_prompts=0"
    )
    with pytest.raises(TrainingDiverged, match="step"):
        chain.fine_tune(recipe, work="diverged")
