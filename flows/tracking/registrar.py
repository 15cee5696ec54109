"""The short child that imports torch to log a run's checkpoints as models and to register the final one.

`python -m flows.tracking.registrar`: one JSON request on stdin, one JSON answer on stdout, logs on stderr. It ends
when its stdin does.
"""

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.errors import SafelightError, ServiceUnavailable
from components.stages import Bench
from components.workspace import Workspace
from flows.journal import journal_path, read_entries
from flows.tracking.batches import BATCH_ENTITIES
from flows.tracking.registration import Checkpoint, RegistrationRequest
from flows.tracking.registry import find_aliases, find_versions
from flows.tracking.sender import Sender
from flows.tracking.server import (
    ADAPTER_TAG,
    DATASET_DIGEST_CHARACTERS,
    RUN_TAG,
    first_line,
    import_mlflow,
    reaching,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun
    from mlflow.models import ModelSignature

STEP_TAG = "safelight.step"
MODEL_REQUIREMENTS = ("diffusers", "transformers", "torch", "peft", "safetensors", "accelerate")
RETRY_AFTER_S = (1, 5)

logger = logging.getLogger(__name__)


def register(request: RegistrationRequest) -> dict[str, Any]:
    """A `Registration` as a dictionary; tried again after a request that was not answered."""
    os.environ |= {"MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true", "MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}
    for pause_s in RETRY_AFTER_S:
        try:
            return _register_once(request)
        except ServiceUnavailable as error:
            logger.warning("%s; trying again", error)
            time.sleep(pause_s)
    return _register_once(request)


def _register_once(request: RegistrationRequest) -> dict[str, Any]:
    import_mlflow()
    import mlflow

    bench = Bench.open(Workspace(Path(request.home)))
    checkpoints = [Checkpoint(**checkpoint) for checkpoint in request.checkpoints]
    with reaching(request.url):
        mlflow.set_tracking_uri(request.url)
        client, run_id = Sender(bench, request.run_uid, request.url).ensure_run(timeout_s=60)
        model_ids = {one.step: _log_checkpoint(client, bench, request, run_id, one) for one in checkpoints}
        final_step = next(one.step for one in checkpoints if one.sha256 == request.final_sha256)
        number = _register_version(client, request, model_ids[final_step])
        if not _has_moved_on(client, request.name, number):
            client.set_registered_model_alias(request.name, "challenger", str(number))
    return {
        "name": request.name,
        "version": number,
        "uri": f"models:/{request.name}/{number}",
        "model_ids": model_ids,
        "mlflow_run_id": run_id,
    }


def _log_checkpoint(
    client: "MlflowClient", bench: Bench, request: RegistrationRequest, run_id: str, checkpoint: Checkpoint
) -> str:
    """The id of the checkpoint's logged model; whatever of it is there already is kept."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run = client.get_run(run_id)
    model = _model_of(client, request, run, checkpoint)
    if model.status != LoggedModelStatus.READY:
        _upload(client, bench, request, model, checkpoint.sha256)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    if model.model_id not in {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=checkpoint.step)])
    _attach_metrics(client, bench, request, checkpoint, model)
    return model.model_id


def _model_of(
    client: "MlflowClient", request: RegistrationRequest, run: "MlflowRun", checkpoint: Checkpoint
) -> "LoggedModel":
    identity = {RUN_TAG: request.run_uid, ADAPTER_TAG: checkpoint.sha256, STEP_TAG: str(checkpoint.step)}
    condition = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_logged_models([run.info.experiment_id], condition)
    if found:
        return found[0]
    return client.create_logged_model(
        run.info.experiment_id,
        name=f"{request.name}-step-{checkpoint.step}",
        source_run_id=run.info.run_id,
        model_type="lora",
        tags=request.tags | identity,
    )


def _upload(
    client: "MlflowClient", bench: Bench, request: RegistrationRequest, model: "LoggedModel", adapter_sha256: str
) -> None:
    from mlflow.diffusers import save_model
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as scratch:
        weights, folder = Path(scratch) / "adapter", Path(scratch) / "model"
        weights.mkdir()
        base = _stock_files(bench, Path(request.base_path), adapter_sha256, weights)
        save_model(
            str(weights),
            str(folder),
            base_model=str(base),
            signature=_signature(request),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in MODEL_REQUIREMENTS],
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=model.source_run_id,
                model_id=model.model_id,
            ),
        )
        client.log_model_artifacts(model.model_id, str(folder))


def _stock_files(bench: Bench, base_path: Path, adapter_sha256: str, folder: Path) -> Path:
    """Write the adapter as MLflow's flavour can load it, which knows `load_lora_weights` alone; returns its base.

    Learned tokens have no place in that call: the base is then one whose vocabulary has them, kept in the workspace.
    Their file lies beside the adapter for whoever loads it on another base.
    """
    from components.config import BaseModelConfig
    from components.families import FAMILIES
    from components.families.bases import find_base
    from components.layouts.vocabulary import base_with_tokens
    from components.training.adapters import ADAPTER_FILE, stock_adapter, tokens_of
    from components.training.export import written_embeddings

    base, pipeline = find_base(BaseModelConfig(model=str(base_path)))
    family, adapter = FAMILIES[pipeline], bench.store.read(adapter_sha256)
    (folder / ADAPTER_FILE).write_bytes(stock_adapter(adapter, family, base))
    tokens = tokens_of(adapter, family)
    written_embeddings(tokens, pipeline, folder)
    return base_with_tokens(base, pipeline, tokens, bench.workspace.bases / adapter_sha256[:16]) if tokens else base


def _signature(request: RegistrationRequest) -> "ModelSignature":
    """MLflow's own signature draws 30 steps of 512 pixels; this one draws as the evaluation did."""
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import ColSpec

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema(
            [
                ParamSpec("num_inference_steps", DataType.integer, request.num_inference_steps),
                ParamSpec("guidance_scale", DataType.double, float(request.guidance_scale)),
                ParamSpec("height", DataType.integer, request.resolution),
                ParamSpec("width", DataType.integer, request.resolution),
                ParamSpec("negative_prompt", DataType.string, ""),
            ]
        ),
    )


def _attach_metrics(
    client: "MlflowClient", bench: Bench, request: RegistrationRequest, checkpoint: Checkpoint, model: "LoggedModel"
) -> None:
    """The run's own points at this step with their own times: MLflow keeps one copy in the series, one at the model."""
    from mlflow.entities import Metric

    assert model.source_run_id  # it was created with one
    name, digest = request.dataset
    points = {
        key: (value, entry.t_ms)
        for entry in read_entries(journal_path(bench.workspace, request.run_uid))
        if entry.kind == "metrics" and entry.body["step"] == checkpoint.step
        for key, value in entry.body["values"].items()
    }
    if checkpoint.sha256 == request.final_sha256:
        points = {key: (value, model.creation_timestamp) for key, value in request.metrics.items()} | points
    if points:
        client.log_batch(
            model.source_run_id,
            metrics=[
                Metric(
                    key,
                    value,
                    t_ms,
                    checkpoint.step,
                    model_id=model.model_id,
                    dataset_name=name,
                    dataset_digest=digest[:DATASET_DIGEST_CHARACTERS],
                    run_id=model.source_run_id,
                )
                for key, (value, t_ms) in list(points.items())[:BATCH_ENTITIES]
            ],
        )


def _register_version(client: "MlflowClient", request: RegistrationRequest, model_id: str) -> int:
    import mlflow

    identity = {RUN_TAG: request.run_uid, ADAPTER_TAG: request.final_sha256}
    for found in find_versions(client, request.name):
        if identity.items() <= found.tags.items():
            return int(found.version)
    return int(mlflow.register_model(f"models:/{model_id}", request.name, tags=request.tags | identity).version)


def _has_moved_on(client: "MlflowClient", name: str, number: int) -> bool:
    """Whether this version was promoted, or a newer one challenges: registering again moves no alias back."""
    held = find_aliases(client, name)
    return number in (held.get("champion"), held.get("previous")) or held.get("challenger", 0) > number


def main(work: Callable[[RegistrationRequest], dict[str, Any]] = register) -> int:
    """Answer one request; 1 when that is an error."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is a log
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    request = RegistrationRequest(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        answer = work(request)
    except Exception as error:
        if not isinstance(error, SafelightError):  # whose one line says it all
            logger.exception("registration failed")
        answer = {"type": type(error).__name__, "error": first_line(error)}
    print(json.dumps(answer), file=answers, flush=True)
    return 1 if "error" in answer else 0


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(137)


if __name__ == "__main__":
    sys.exit(main())
