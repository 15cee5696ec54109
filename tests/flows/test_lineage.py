"""Which training an adapter belongs to, whoever looks at it later."""

from types import SimpleNamespace
from typing import Any

import pytest

from components.catalog.models import Adapter
from components.config import looking_at, parse_recipe
from components.stages import Bench, Product, StageResult
from components.storage import ObjectRef
from flows.retrain import _note_adapters

RECIPE = parse_recipe({"name": "icons", "data": {"sources": [{"path": "."}]}}, origin="the test")


@pytest.mark.parametrize("known", [True, False])
def test_evaluating_an_adapter_file_does_not_take_it_from_the_training_that_made_it(
    bench: Bench, tmp_path: Any, known: bool
):
    def note(recipe: Any, key: str, step: int) -> None:
        outputs = {"adapter": ObjectRef("a" * 64, 1), f"adapter-{step}": ObjectRef("a" * 64, 1)}
        run: Any = SimpleNamespace(bench=bench, recipe=recipe)
        _note_adapters(run, StageResult("fine-tune", key, "produced", 1.0, Product(outputs)))

    if known:
        note(RECIPE, "training", 600)
    note(looking_at(RECIPE, tmp_path / "a.safetensors"), "a look", 0)
    with bench.catalog.read() as session:
        adapter = session.get(Adapter, "a" * 64)
    assert adapter is not None
    assert (adapter.stage_key, adapter.step) == (("training", 600) if known else ("a look", 0))
