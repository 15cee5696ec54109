"""Studies: every gallery once, resumed from what is drawn, scored like an evaluation, and drawn for the eye."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from components.config import EvaluationConfig
from components.errors import BaseModelError
from components.evaluation import generation, metrics
from components.evaluation.embedders import load_embedder
from components.evaluation.feature_cache import EmbeddedSamples, features_of_gallery
from components.evaluation.generation import Settings, draw_gallery
from components.evaluation.intervals import Interval
from components.evaluation.prompts import gallery_requests
from components.evaluation.study import Point, StudyPlan, arrivals, cells, network_evaluations, study_samplers
from components.stages import Product
from tests.chain import Chain, ignore

PLAN = StudyPlan(samplers=("ddim", "heun"), steps=(1, 3), guidance=(1.0, 4.0), guidance_steps=2)
CONFIG = EvaluationConfig(prompts=4, variety_prompts=2, variety_seeds=2, batch_size=4, guidance_scale=2.0)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain.build(tmp_path_factory.mktemp("chain"))


def run(chain: Chain, drawn: list[int] | None = None) -> Product:
    rows = chain.curate(chain.recipe())
    note = ignore if drawn is None else lambda done, total: drawn.append(total)
    bases = {"tiny": chain.base()}
    return study_samplers(chain.bench, rows, bases, PLAN, CONFIG, 32, run_uid=None, on_progress=note)


@pytest.fixture(scope="module")
def study(chain: Chain) -> Product:
    return run(chain)


def test_every_sampler_is_drawn_at_every_number_of_steps_and_guidance_once_more(study: Product):
    points = study.facts["points"]
    drawn = [(p["sampler"], p["steps"], p["evaluations"], p["guidance"]) for p in points]
    assert drawn == [
        ("ddim", 1, 1, 2.0), ("ddim", 3, 3, 2.0), ("heun", 1, 1, 2.0), ("heun", 3, 5, 2.0),
        ("auto", 2, 2, 1.0), ("auto", 2, 2, 4.0),
    ]  # fmt: skip
    assert [p["variety"] is not None for p in points] == [False] * 4 + [True] * 2


def test_a_point_is_the_kid_of_its_gallery(chain: Chain, study: Product):
    rows = [row for row in chain.curate(chain.recipe()) if row.split == "test"]
    requests = gallery_requests(rows, CONFIG.model_copy(update={"variety_prompts": 0}))
    settings = Settings.of(CONFIG.model_copy(update={"scheduler": "heun", "num_inference_steps": 3}), 32)
    gallery = draw_gallery(
        chain.bench, chain.base(), None, requests, settings, run_uid=None, on_progress=lambda _: None
    )
    embedder = load_embedder("auto")
    references = EmbeddedSamples(chain.bench, embedder, rows, chain.base(), 32).features
    expected = metrics.kid(features_of_gallery(chain.bench, embedder, gallery), references)
    assert study.facts["points"][3]["kid"]["value"] == pytest.approx(expected, abs=1e-12)


def test_a_study_that_is_run_again_draws_nothing_and_says_the_same(
    chain: Chain, study: Product, monkeypatch: pytest.MonkeyPatch
):
    objects = set(chain.bench.workspace.objects.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr(generation, "draw_batch", None)  # which nothing may ask
        again = run(chain)
    assert again.outputs["points"] == study.outputs["points"]
    assert set(chain.bench.workspace.objects.rglob("*")) == objects


def test_the_figure_is_a_picture_and_the_points_are_json(chain: Chain, study: Product):
    figure = Image.open(io.BytesIO(chain.bench.store.read(study.outputs["figure"].sha256)))
    assert figure.format == "PNG" and len(np.unique(np.asarray(figure.convert("L")))) > 50
    assert json.loads(chain.bench.store.read(study.outputs["points"].sha256)) == study.facts


def test_a_sampler_that_suits_no_base_is_refused_and_one_of_many_is_left_out(chain: Chain):
    bases = {"tiny": chain.base()}
    with pytest.raises(BaseModelError, match="sampler is 'flow_euler'"):
        cells(bases, replace(PLAN, samplers=("ddim", "flow_euler")), 2.0)
    assert {cell.sampler for cell in cells(bases, StudyPlan(), 2.0)} >= {"ddpm", "unipc", "auto"}


def test_heun_asks_twice_in_all_steps_but_the_last(chain: Chain):
    assert [network_evaluations(chain.base(), "heun", steps) for steps in (1, 2, 10)] == [1, 3, 19]
    assert network_evaluations(chain.base(), "euler", 10) == 10


def test_a_sampler_arrives_where_it_is_first_near_the_best_of_its_base():
    def point(sampler: str, evaluations: int, kid: float) -> Point:
        interval = Interval(kid, kid, kid, 10, 10)
        return Point("b", sampler, evaluations, evaluations, 4.0, interval, interval, None)

    swept = [point("ddim", 5, 0.30), point("ddim", 10, 0.21), point("ddim", 50, 0.20), point("ddpm", 50, 0.5)]
    found = {line["sampler"]: line["evaluations"] for line in arrivals([*swept, point("auto", 20, 0.01)])}
    assert found == {"ddim": 10, "ddpm": None}
