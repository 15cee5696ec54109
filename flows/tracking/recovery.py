"""What an outage or a crash kept from MLflow: the rest of a journal, and the word that a run has ended."""

import json
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

from components.catalog.models import Run
from components.errors import ServiceUnavailable
from components.stages import Bench
from flows import services
from flows.journal import journals
from flows.tracking.sender import Cursor, Sender
from flows.tracking.server import RUN_TAG, connect, reaching, require_server
from flows.tracking.tracker import MLFLOW_STATUS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

PAGE = 1000  # what lies beyond is found the next time
TIMEOUT_S = 20


def pending(bench: Bench) -> list[str]:
    """The runs whose journal holds something that MLflow does not have yet, oldest first."""
    return [path.parent.name for path in journals(bench.workspace) if Cursor.beside(path).behind(path)]


def catch_up(bench: Bench, run_uid: str, *, url: str | None = None) -> int:
    """Send what an outage or a crash left of a run's journal; returns the number of entries sent.

    Raises ServiceUnavailable when MLflow is away (now or half-way: the next call goes on from there).
    """
    address = require_server(bench.workspace, url)
    sender = Sender(bench, run_uid, address)
    with reaching(address):
        return sender.send_pending() if sender.pending() else 0


def heal(bench: Bench, *, url: str | None = None) -> list[tuple[str, str]]:
    """End the MLflow runs that say RUNNING while the catalog knows better; returns (run_uid, new status) of each."""
    address = require_server(bench.workspace, url)
    healed = []
    with reaching(address):
        client = connect(address)
        for run in _running(client):
            run_uid = run.data.tags[RUN_TAG]
            with bench.catalog.read() as session:
                known = session.get(Run, run_uid)
            if known is not None and known.status in MLFLOW_STATUS:
                ended = int(known.ended_at.timestamp() * 1000) if known.ended_at else None
                client.set_terminated(run.info.run_id, status=MLFLOW_STATUS[known.status], end_time=ended)
                healed.append((run_uid, MLFLOW_STATUS[known.status]))
    return healed


def _running(client: "MlflowClient") -> "list[MlflowRun]":
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if not experiments:
        return []
    condition = f"attributes.status = 'RUNNING' and tags.`{RUN_TAG}` LIKE '%'"
    return list(client.search_runs(experiments, condition, max_results=PAGE))


def left_running(bench: Bench) -> list[str]:
    """The runs that `heal` would end, asked over HTTP alone: importing MLflow takes seconds.

    Raises ServiceUnavailable when MLflow is away; a workspace without an MLflow over HTTP has none.
    """
    root = services.current(bench.workspace).mlflow_url
    if not root.startswith("http"):
        return []
    experiments = _call(root, "experiments/search", {"max_results": PAGE}).get("experiments", [])
    if not experiments:
        return []
    ids = [experiment["experiment_id"] for experiment in experiments]
    condition = {"experiment_ids": ids, "max_results": PAGE, "filter": "attributes.status = 'RUNNING'"}
    found = _call(root, "runs/search", condition).get("runs", [])
    run_uids = [tag["value"] for run in found for tag in run["data"].get("tags", []) if tag["key"] == RUN_TAG]
    with bench.catalog.read() as session:
        rows = [session.get(Run, run_uid) for run_uid in run_uids]
    return [row.run_uid for row in rows if row is not None and row.status != "running"]


def _call(root: str, path: str, body: dict[str, Any]) -> Any:
    request = Request(f"{root}/api/2.0/mlflow/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.loads(answer.read())
    except (OSError, HTTPException) as error:
        raise ServiceUnavailable(
            f"MLflow at {root} answered {path} with {error}; `safelight status` shows its state"
        ) from None
