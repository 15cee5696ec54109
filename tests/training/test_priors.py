"""Prior preservation: the class's pictures are drawn once, weigh what the recipe says, and change no exactness."""

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from components.config import BaseModelConfig
from components.errors import RecipeError, Stopped
from components.families.bases import resolve_base
from components.latents.keys import usual_sizing
from components.training import priors
from components.training.order import epoch_order
from components.training.priors import class_rows, spread_over
from components.training.samples import cached_samples
from tests.chain import Chain
from tests.curation.folders import pictures

CLASS = ('training.class_prompt="a sign"', "training.num_class_images=2")
TINY = (
    "training.max_train_steps=2",
    "training.checkpointing_steps=2",
    "training.train_batch_size=8",
    "training.validation_items=2",
    "training.validation_times=1",
    "training.preview_prompts=0",
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain.build(tmp_path_factory.mktemp("chain"))
    chain.cache(chain.recipe())
    return chain


def test_the_class_is_drawn_by_the_base_once_and_found_by_content_afterwards(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
):
    base = resolve_base(BaseModelConfig(model=str(chain.base_path)))
    training = chain.recipe(*CLASS).training
    rows = class_rows(chain.bench, base, training, usual_sizing(base, 32))
    assert [(row.text, row.split, row.width, row.height) for row in rows] == [("a sign", "train", 32, 32)] * 2
    assert len({row.sha256 for row in rows}) == 2

    def nobody(*given: Any, **named: Any) -> Any:
        raise AssertionError("a pipeline was opened although every picture of the class is known")

    monkeypatch.setattr("components.evaluation.generation.open_pipeline", nobody)
    assert class_rows(chain.bench, base, training, usual_sizing(base, 32)) == rows
    assert class_rows(chain.bench, base, chain.recipe().training, usual_sizing(base, 32)) == []
    assert priors.cache_latents(chain.bench, rows, base, usual_sizing(base, 32), lambda done, total: None).items == 0


def test_as_many_class_pictures_as_samples_each_as_often_as_the_others(chain: Chain):
    base = chain.base()
    rows = class_rows(chain.bench, base, chain.recipe(*CLASS).training, usual_sizing(base, 32))
    spread = spread_over(rows, 5)
    assert [row.sha256 for row in spread] == [rows[i].sha256 for i in (0, 1, 0, 1, 0)]
    assert spread_over([], 5) == []


def test_the_class_comes_between_the_data_instead_of_one_after_the_other(chain: Chain):
    data = [row for row in chain.curate(chain.recipe()) if row.split == "train"]
    base, sizing = chain.base(), usual_sizing(chain.base(), 32)
    prior = spread_over(class_rows(chain.bench, base, chain.recipe(*CLASS).training, sizing), len(data))
    samples = cached_samples(chain.bench, data + prior, base, sizing, masked=False)
    weighted = replace(samples, weights=(1.0,) * len(samples.rows))
    classes = [position >= len(data) for position in epoch_order(0, 0, weighted.ids)]
    longest = max(len(list(run)) for _, run in groupby(classes))
    assert sum(classes) == len(data)
    assert longest < 15  # of 100 fair coins a run of 15 is met in one of 400 tosses; clumped it would be 25


def test_the_first_steps_loss_is_a_line_in_the_weight_of_the_prior(chain: Chain):
    """Mean of the data's losses plus weight times the class's, before any step has changed the adapter."""

    def first_loss(weight: float) -> float:
        events: list[dict[str, Any]] = []
        recipe = chain.recipe(*TINY, *CLASS, f"training.prior_loss_weight={weight}")
        with pytest.raises(Stopped):
            chain.fine_tune(recipe, work=f"weight-{weight}", stop_after=1, events=events)
        return next(event["loss"] for event in events if "loss" in event)

    one, two, three = (first_loss(weight) for weight in (1.0, 2.0, 3.0))
    assert two > one
    assert three - two == pytest.approx(two - one, rel=1e-4)


def test_pictures_that_someone_chose_for_the_class_weigh_as_drawn_ones_do(chain: Chain, tmp_path: Path):
    chosen = pictures(tmp_path / "class", 4)
    held = f'data.sources=[{{path="{chain.pictures}"}}, {{path="{chosen}", is_reg=true}}]'
    chain.cache(chain.recipe(held))

    def first_loss(weight: float) -> float:
        events: list[dict[str, Any]] = []
        recipe = chain.recipe(*TINY, held, f"training.prior_loss_weight={weight}")
        with pytest.raises(Stopped):
            chain.fine_tune(recipe, work=f"chosen-{weight}", stop_after=1, events=events)
        return next(event["loss"] for event in events if "loss" in event)

    one, two, three = (first_loss(weight) for weight in (1.0, 2.0, 3.0))
    assert two > one
    assert three - two == pytest.approx(two - one, rel=1e-4)


def test_a_recipe_needs_data_besides_the_class(chain: Chain):
    with pytest.raises(RecipeError, match=r"every source of data\.sources has is_reg"):
        chain.recipe("data.sources=[{path='x', is_reg=true}]")


def test_a_training_with_a_prior_survives_a_stop_to_the_byte(chain: Chain):
    recipe = chain.recipe(*TINY, *CLASS)
    unbroken = chain.fine_tune(recipe, work="unbroken")
    with pytest.raises(Stopped):
        chain.fine_tune(recipe, work="broken", stop_after=1)
    assert chain.fine_tune(recipe, work="broken").outputs == unbroken.outputs


@pytest.mark.parametrize("setting", ["num_class_images=10", "prior_loss_weight=0.5"])
def test_a_prior_without_a_class_is_refused(chain: Chain, setting: str):
    with pytest.raises(RecipeError, match="but class_prompt is not set"):
        chain.recipe(f"training.{setting}")
