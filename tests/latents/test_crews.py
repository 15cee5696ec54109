"""Encoding by a crew: the cache is, to the byte, what one process makes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from components.catalog.encodings import locate
from components.catalog.models import EncodedItem, MeasuredItem
from components.config import CurationConfig
from components.curation.judges import measuring
from components.curation.judges.measuring import measure
from components.curation.snapshots import curate
from components.evaluation.model_sources import feature_key
from components.latents import crews, encoding, pieces
from components.latents.caching import cache_latents
from components.latents.keys import training_sizing
from components.shards import Crew, Engine, run_shards
from tests.chain import Chain
from tests.curation.folders import mixed_folder, new_bench, sources
from tests.tiny import tiny_clip


@pytest.fixture
def in_small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is to encode, a crew does it, eight items at a time; sixteen make a shard."""
    monkeypatch.setattr(encoding, "LEASE_ITEMS", 8)
    monkeypatch.setattr(crews, "SHARE_ITEMS", 8)
    monkeypatch.setattr(crews, "WORTH_A_CREW", 0)
    for module in (pieces, crews):
        monkeypatch.setattr(module, "SHARD_ITEMS", 16)


def set_encoders(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_ENGINE", crew.engine)
    monkeypatch.setenv("SAFELIGHT_PROCESSES", str(crew.processes))
    monkeypatch.setenv("SAFELIGHT_ENCODERS", str(crew.processes))


@pytest.mark.usefixtures("in_small_shares")
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_cache_is_the_same_from_one_process_and_from_a_crew_of_which_one_is_killed(
    engine: Engine, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if engine == "ray":
        request.getfixturevalue("two_on_ray")
    chain = Chain.build(tmp_path)
    recipe = chain.recipe("training.resolution=[32,16]")
    alone = chain.cache(recipe)
    chain = replace(chain, bench=new_bench(tmp_path / "other"))
    rows, sizing = chain.curate(recipe), training_sizing(chain.base(), recipe.training)
    set_encoders(Crew(engine, 2), monkeypatch)
    told: list[tuple[int, int]] = []
    killed: list[int] = []

    def watch(done: int, total: int) -> None:
        told.append((done, total))
        if done > 61 and engine == "local" and not killed:  # of the captions all, of the pictures the first share
            workers = [child for child in psutil.Process().children() if "components.shards" in child.cmdline()]
            workers[0].kill()
            killed.append(workers[0].pid)

    made = cache_latents(chain.bench, rows, chain.base(), sizing, watch)
    assert made.outputs == alone.outputs and len(made.outputs) > 10
    assert told[-1] == (alone.items, alone.items)
    if engine == "ray":
        assert made.facts == alone.facts
    else:  # what the killed one had written of its share is nobody's count
        assert killed and alone.items - 8 <= made.items <= alone.items
    assert not [path for path in chain.bench.workspace.pieces.rglob("*") if path.is_file()]
    again = chain.cache(recipe)
    assert again.outputs == alone.outputs and again.items == 0


@pytest.mark.usefixtures("in_small_shares")
def test_embeddings_are_the_same_from_one_process_and_from_ray(
    two_on_ray: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = mixed_folder(tmp_path / "data")

    def found(home: Path) -> tuple[dict[str, tuple[str, int]], list[int]]:
        """Where each picture's features lie, and how many pictures were looked at."""
        bench = new_bench(home)
        looked: list[int] = []
        curate(bench, sources(folder), CurationConfig(near_duplicate_embedder="imagenet"), dataset="blobs",
               training_size=64, measure=lambda work: looked.append(measure(bench, work, "cpu", lambda *_: None)))
        with bench.catalog.read() as session:
            keys = list(session.scalars(select(EncodedItem.item)))
        return locate(bench.catalog, feature_key("imagenet"), keys), looked

    alone = found(tmp_path / "alone")
    set_encoders(two_on_ray, monkeypatch)
    assert found(tmp_path / "home") == alone and alone[1] == [29]


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_scores_of_models_are_the_same_from_one_process_and_from_a_crew(
    engine: Engine, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if engine == "ray":
        request.getfixturevalue("two_on_ray")
    monkeypatch.setattr(measuring, "CHUNK", 8)
    monkeypatch.setattr(measuring, "WORTH_A_CREW", 0)
    folder, clip = mixed_folder(tmp_path / "data"), tiny_clip(tmp_path / "clip")
    asked: list[str] = []

    def run(*arguments: Any, **options: Any) -> None:
        asked.append(arguments[3].engine)
        run_shards(*arguments, **options)

    monkeypatch.setattr(measuring, "run_shards", run)

    def scores(home: Path) -> dict[str, bytes]:
        bench, looked = new_bench(home), []
        check = {"threshold": -1, "model": f"clip:{clip}"}
        curate(bench, sources(folder), CurationConfig.model_validate({"checks": {"caption_match": check}}),
               dataset="blobs", training_size=64,
               measure=lambda work: looked.append(measure(bench, work, "cpu", lambda *_: None)))  # fmt: skip
        with bench.catalog.read() as session:
            query = select(MeasuredItem.item, MeasuredItem.figures).where(MeasuredItem.measure.startswith("caption_"))
            found = dict(session.execute(query).tuples().all())
        assert looked == [len(found)]
        return found

    alone = scores(tmp_path / "alone")
    assert len(alone) > 16 and not asked
    set_encoders(Crew(engine, 2), monkeypatch)
    assert scores(tmp_path / "other") == alone and asked == [engine]
