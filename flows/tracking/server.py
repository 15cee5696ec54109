"""A workspace's MLflow server: where it is, a client for it, and one error for all the ways to miss it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from components.errors import ServiceUnavailable, StageFailed
from components.workspace import Workspace
from flows import services

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "safelight.run_uid"  # on runs, logged models and versions: the run that made them
ADAPTER_TAG = "safelight.adapter_sha256"  # on logged models and versions
DATASET_DIGEST_CHARACTERS = 32  # of ours; MLflow takes at most 36
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # the server will never take this, however often it is sent
CLIENT_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the client would repeat a creation whose answer was lost
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def find_server(workspace: Workspace) -> str | None:
    """Where MLflow is: `SAFELIGHT_MLFLOW_URI`, `MLFLOW_TRACKING_URI`, or what `safelight up` last started here."""
    if url := os.environ.get("SAFELIGHT_MLFLOW_URI") or os.environ.get("MLFLOW_TRACKING_URI"):
        return url
    return services.current(workspace).mlflow_url or None


def require_server(workspace: Workspace, url: str | None = None) -> str:
    """`url`, or where MLflow is. Raises ServiceUnavailable when nobody knows."""
    url = url or find_server(workspace)
    if url is None:
        raise ServiceUnavailable("no MLflow server is known for this workspace; start one with `safelight up`")
    return url


def import_mlflow() -> None:
    """Import the client, which takes seconds; quiet, and without its own retries."""
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401


def connect(url: str) -> "MlflowClient":
    import_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url, registry_uri=url)


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn whatever the client raises for a server that is away into the one error with the mend."""
    try:
        yield
    except Exception as error:
        from mlflow.exceptions import MlflowException

        if is_refusal(error):
            raise StageFailed(f"MLflow at {url} refused the request: {first_line(error)}") from error
        if isinstance(error, MlflowException | OSError):  # requests' exceptions are OSErrors
            raise ServiceUnavailable(f"MLflow at {url}: {first_line(error)}; start it with `safelight up`") from error
        raise


def run_url(url: str, experiment_id: str, mlflow_run_id: str) -> str:
    """Where MLflow's interface shows a run."""
    return f"{url.rstrip('/')}/#/experiments/{experiment_id}/runs/{mlflow_run_id}"


def is_refusal(error: Exception) -> bool:
    return getattr(error, "error_code", None) in REFUSALS


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
