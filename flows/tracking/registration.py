"""Registering a run's adapter: what is asked of the registrar, a child that may import torch, and its answer."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.errors import ServiceUnavailable, StageFailed
from components.stages import Bench
from flows.children import ROOT
from flows.tracking.documents import evaluation_series
from flows.tracking.registry import mirror_versions
from flows.tracking.server import require_server

REGISTRAR = "flows.tracking.registrar"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter object of the store, as trained after `step` optimizer steps."""

    step: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Registration:
    """A registered version; `model_ids` maps each checkpoint's step to its logged model."""

    name: str
    version: int
    uri: str
    model_ids: dict[int, str]
    mlflow_run_id: str


@dataclass(frozen=True, slots=True)
class RegistrationRequest:
    """What the registrar is told, as one JSON line."""

    home: str
    url: str
    run_uid: str
    name: str
    base_path: str
    checkpoints: list[dict[str, Any]]
    final_sha256: str
    dataset: tuple[str, str]  # name, digest
    tags: dict[str, str]
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    metrics: dict[str, float]  # of the final checkpoint


def register_model(
    bench: Bench,
    *,
    run_uid: str,
    name: str,
    base_path: Path,
    checkpoints: Sequence[Checkpoint],
    final_sha256: str,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    metrics: Mapping[str, Mapping[str, Any]],
    dataset: tuple[str, str],
    tags: Mapping[str, str],
    url: str | None = None,
    timeout_s: float = 600.0,
) -> Registration:
    """Log every checkpoint as a model of the run, register the final one and point the alias challenger at it.

    The registrar dies with this process; what a killed one left is taken up, not repeated. Metrics that the run's
    journal holds at a checkpoint's step are attached to its model, and `metrics`, an evaluation's document, to the
    final one. `base_path` is a folder in diffusers layout, `dataset` (name, digest) of the snapshot; tags get the
    prefix `safelight.`. Raises ServiceUnavailable when MLflow is away, StageFailed when the registrar ends otherwise.
    """
    request = RegistrationRequest(
        home=str(bench.workspace.home),
        url=require_server(bench.workspace, url),
        run_uid=run_uid,
        name=name,
        base_path=str(Path(base_path).resolve()),
        checkpoints=[asdict(checkpoint) for checkpoint in checkpoints],
        final_sha256=final_sha256,
        dataset=dataset,
        tags={f"safelight.{key}": value for key, value in tags.items()},
        resolution=resolution,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        metrics=evaluation_series(metrics),
    )
    answer = ask_registrar(asdict(request), timeout_s)
    answer["model_ids"] = {int(step): model_id for step, model_id in answer["model_ids"].items()}
    registration = Registration(**answer)
    mirror_versions(bench, name, url=request.url)
    return registration


def ask_registrar(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The answer of a registrar of its own, which is killed with all it started when it takes longer."""
    child = subprocess.Popen(
        [sys.executable, "-m", REGISTRAR],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
        cwd=ROOT,
    )
    assert child.stdin and child.stdout
    killer = threading.Timer(timeout_s, _kill_group, [child.pid])
    killer.start()
    try:
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()  # and left open: the child takes its end for the end of this process
        answer = child.stdout.read()
        child.wait()
    except BrokenPipeError:
        answer = ""
    finally:
        killer.cancel()
        _kill_group(child.pid)
        child.wait()
    try:
        body = json.loads(answer)
    except ValueError:
        raise StageFailed(
            f"registering with MLflow ended with exit code {child.returncode} and no answer; "
            "the log above says why, and running again goes on from there"
        ) from None
    if "error" in body:
        raise (ServiceUnavailable if body["type"] == "ServiceUnavailable" else StageFailed)(body["error"])
    return body


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
