"""A study through the command line: its series and its figure in MLflow, its table for a person."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.conftest import Served
from tests.flows.conftest import safelight


@pytest.mark.services
def test_a_study_of_samplers_reaches_mlflow_and_draws_its_figure(
    served: Served, trained: dict[str, Any], tmp_path: Path
):
    words = ("study", "samplers", trained["recipe_path"], "--sampler", "ddim", "--sampler", "euler")
    document = safelight(served, *words, "--steps", "1,2", "--guidance", "1,2", "--out", str(tmp_path / "figure.png"))
    assert [(p["sampler"], p["steps"]) for p in document["points"]] == [
        ("ddim", 1), ("ddim", 2), ("euler", 1), ("euler", 2), ("auto", 20), ("auto", 20),
    ]  # fmt: skip
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    client = MlflowClient(served.urls.mlflow_url)
    run = client.get_run(document["mlflow"].rsplit("/", 1)[1])
    series = client.get_metric_history(run.info.run_id, "kid/base/euler")
    assert {point.step: point.value for point in series} == {
        p["evaluations"]: p["kid"]["value"] for p in document["points"] if p["sampler"] == "euler"
    }
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} >= {"samplers.png", "samplers.json"}
    refused = safelight(served, *words, "--steps", "0", code=2)["error"]
    assert refused.startswith("--steps '0': expected numbers of at least 1")
    assert "expected NAME=MODEL" in safelight(served, *words, "--base", "embedded", code=2)["error"]
