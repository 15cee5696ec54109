"""Galleries: paired, reproducible to the bit, drawn once, and judged with intervals."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from sqlalchemy import select

from components.catalog.models import Evaluation, Generation
from components.config import EvaluationConfig
from components.diffusion.samplers import SAMPLERS
from components.diffusion.schedules import NoiseSchedule
from components.errors import BadInput, BaseModelError
from components.evaluation.evaluate import Contender, evaluate
from components.evaluation.generation import Request, Settings, draw_gallery, open_pipeline
from components.evaluation.prompts import choose_prompts, gallery_requests
from components.stages import Product
from tests.chain import Chain, ignore

FAST = (
    "training.max_train_steps=4",
    "training.checkpointing_steps=4",
    "training.preview_prompts=0",
    "training.targets=all",
    "training.learning_rate=1e-2",
)
SETTINGS = Settings(num_inference_steps=2, guidance_scale=2.0, scheduler="auto", side=32, batch_size=4, threads=1)
REQUESTS = [Request(i, f"disc {i}", None, seed=i) for i in range(6)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain.build(tmp_path_factory.mktemp("chain"))
    chain.cache(chain.recipe())
    return chain


@pytest.fixture(scope="module")
def trained(chain: Chain) -> Product:
    return chain.fine_tune(chain.recipe(*FAST))


def pixels(chain: Chain, sha256: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(chain.bench.store.read(sha256))))


def test_prompts_go_round_the_held_out_concepts_and_a_larger_count_only_adds(chain: Chain):
    rows = [row for row in chain.curate(chain.recipe()) if row.split == "test"]
    few, more = choose_prompts(rows, 2), choose_prompts(rows, 10)
    assert {group for _, group in few} == {row.group for row in rows}
    assert more[:2] == few
    assert len(set(more)) == len(more) == 10


def test_nothing_held_out_is_said_in_one_line():
    with pytest.raises(BadInput, match="holds nothing out"):
        choose_prompts([], 10)


def test_no_two_pictures_of_a_gallery_share_their_noise(chain: Chain):
    rows = [row for row in chain.curate(chain.recipe()) if row.split == "test"]
    requests = gallery_requests(rows, EvaluationConfig(prompts=10, variety_prompts=3, variety_seeds=4))
    assert len(requests) == 10 + 3 * 3
    assert len({request.seed for request in requests}) == len(requests)


def test_a_micro_batch_drawn_again_has_the_same_bytes_and_a_drawn_one_is_not_drawn_again(chain: Chain):
    counted: list[int] = []
    first = draw_gallery(chain.bench, chain.base(), None, REQUESTS, SETTINGS, run_uid=None, on_progress=counted.append)
    assert (sum(counted), [p.batch_index for p in first]) == (6, [0, 0, 0, 0, 1, 1])
    for picture in first:
        chain.bench.store.path(picture.sha256).unlink()
    again = draw_gallery(chain.bench, chain.base(), None, REQUESTS, SETTINGS, run_uid=None, on_progress=lambda _: None)
    assert again == first
    before = {picture.sha256: chain.bench.store.path(picture.sha256).stat().st_mtime_ns for picture in first}
    draw_gallery(chain.bench, chain.base(), None, REQUESTS, SETTINGS, run_uid=None, on_progress=lambda _: None)
    assert before == {sha256: chain.bench.store.path(sha256).stat().st_mtime_ns for sha256 in before}


def test_a_picture_does_not_depend_on_its_neighbours(chain: Chain):
    gallery = draw_gallery(
        chain.bench, chain.base(), None, REQUESTS, SETTINGS, run_uid=None, on_progress=lambda _: None
    )
    alone = draw_gallery(
        chain.bench, chain.base(), None, [REQUESTS[5]], SETTINGS, run_uid=None, on_progress=lambda _: None
    )
    assert np.array_equal(pixels(chain, gallery[5].sha256), pixels(chain, alone[0].sha256))


NAMES = [name for name in get_args(EvaluationConfig.model_fields["scheduler"].annotation) if name != "auto"]
CHOSEN = [name for name in NAMES if NoiseSchedule in SAMPLERS[name].classes]  # those for the chain's base


def test_every_sampler_of_the_recipe_draws_its_own_picture(chain: Chain):
    assert set(NAMES) < set(SAMPLERS) and len(CHOSEN) == 8
    drawn = {
        draw_gallery(
            chain.bench, chain.base(), None, REQUESTS[:1], replace(SETTINGS, scheduler=name, num_inference_steps=4),
            run_uid=None, on_progress=lambda _: None,
        )[0].sha256
        for name in CHOSEN
    }  # fmt: skip
    assert len(drawn) == len(CHOSEN)


def test_a_sampler_that_does_not_suit_the_base_is_refused_with_those_that_do(chain: Chain):
    with pytest.raises(BaseModelError, match=r"'flow_euler'.*expected auto, ddpm, ddim"):
        open_pipeline(chain.bench.store, chain.base(), None, "flow_euler")


def test_every_picture_says_how_it_was_made(chain: Chain):
    (picture,) = draw_gallery(
        chain.bench, chain.base(), None, REQUESTS[:1], SETTINGS, run_uid=None, on_progress=lambda _: None
    )
    text = Image.open(io.BytesIO(chain.bench.store.read(picture.sha256))).text  # type: ignore[attr-defined]
    assert json.loads(text["safelight"])["request"]["prompt"] == "disc 0"
    assert "Seed: 0" in text["parameters"]
    assert "trainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]


def run_evaluation(chain: Chain, trained: Product, key: str = "e" * 32, champion: str | None = None) -> Product:
    recipe = chain.recipe()
    contenders = [Contender("base", None, 0)]
    if champion:
        contenders.append(Contender("champion", champion, 0))
    contenders.append(Contender("candidate", trained.facts["sha256"], trained.facts["final_step"]))
    return evaluate(
        chain.bench,
        key,
        chain.curate(recipe),
        chain.base(),
        contenders,
        recipe.evaluation,
        recipe.promotion,
        32,
        trained.outputs["validation"],
        final_step=4,
        snapshot_digest="s" * 64,
        run_uid="r",
        on_progress=ignore,
    )


def test_an_evaluation_gives_every_metric_with_an_interval_and_a_verdict(chain: Chain, trained: Product):
    facts = run_evaluation(chain, trained).facts
    assert {"kid", "prompt_match", "style", "nearest_training", "variety", "copy_rate", "validation_ratio"} <= set(
        facts["metrics"]
    )
    for metric in facts["metrics"].values():
        assert {"candidate", "base", "champion", "difference", "n", "better"} <= set(metric)
        assert {"value", "low", "high"} == set(metric["difference"])
    assert facts["gate"]["decision"] in ("promote", "hold", "reject")
    json.dumps(facts, allow_nan=False)


def test_evaluating_again_gives_the_same_bytes_and_keeps_the_pictures_ids(chain: Chain, trained: Product):
    first = run_evaluation(chain, trained)
    with chain.bench.catalog.read() as session:
        ids = [g.id for g in session.scalars(select(Generation).order_by(Generation.id))]
    second = run_evaluation(chain, trained)
    with chain.bench.catalog.read() as session:
        assert ids == [g.id for g in session.scalars(select(Generation).order_by(Generation.id))]
        assert len(session.scalars(select(Evaluation)).all()) == 1
    assert first.outputs == second.outputs


def test_a_candidate_equal_to_its_champion_differs_by_nothing_and_is_held(chain: Chain, trained: Product):
    facts = run_evaluation(chain, trained, key="c" * 32, champion=trained.facts["sha256"]).facts
    assert facts["metrics"]["kid"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert facts["gate"]["decision"] == "hold"


def test_the_candidates_gallery_is_what_the_stock_pipeline_draws_from_the_stored_settings(
    chain: Chain, trained: Product, tmp_path: Path
):
    run_evaluation(chain, trained)
    with chain.bench.catalog.read() as session:
        batch = session.scalars(
            select(Generation)
            .where(Generation.role == "candidate", Generation.batch_index == 0)
            .order_by(Generation.batch_row)
        ).all()
    pipeline = chain.base().architecture.load_pipeline(chain.base_path, "cpu", torch.float32)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(chain.bench.store.read(trained.facts["sha256"]))
    pipeline.load_lora_weights(tmp_path)
    images = pipeline(
        prompt=[g.prompt for g in batch],
        num_inference_steps=4,
        guidance_scale=2.0,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(g.seed) for g in batch],
    ).images
    for generation, image in zip(batch, images, strict=True):
        assert np.array_equal(np.asarray(image), pixels(chain, generation.image_sha256))
