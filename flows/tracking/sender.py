"""Bringing one run's journal to one MLflow server: sending anything a second time changes nothing there."""

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from sqlalchemy import update

from components.catalog.models import Run
from components.errors import SafelightError
from components.stages import Bench
from flows.journal import Entry, journal_path, read_entries
from flows.tracking.batches import batches
from flows.tracking.server import RUN_TAG, connect, first_line, is_refusal, run_url

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Experiment

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # opens the page of runs, not that of agents
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Cursor:
    """How far a journal was sent (`offset` in bytes), and to which MLflow run. Losing it costs sending twice."""

    path: Path
    offset: int = 0
    mlflow_run_id: str | None = None
    experiment_id: str | None = None

    @classmethod
    def beside(cls, journal: Path) -> "Cursor":
        path = journal.with_name("mlflow-cursor.json")
        try:
            body = json.loads(path.read_text())
            return cls(path, int(body["offset"]), body["mlflow_run_id"], body["experiment_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path)

    def write(self) -> None:
        body = {"offset": self.offset, "mlflow_run_id": self.mlflow_run_id, "experiment_id": self.experiment_id}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(body))
        part.replace(self.path)

    def behind(self, journal: Path) -> bool:
        """Whether the journal holds something that was not sent yet."""
        return next(read_entries(journal, self.offset), None) is not None


class Sender:
    """What knows both the journal and the server. Several processes may try: one at a time sends."""

    def __init__(self, bench: Bench, run_uid: str, url: str):
        self.bench, self.run_uid, self.url = bench, run_uid, url
        self.journal = journal_path(bench.workspace, run_uid)
        self.cursor = Cursor.beside(self.journal)
        self.lock = FileLock(self.journal.with_name("mlflow-sender.lock"), thread_local=False)
        self.answered_at: float | None = None  # monotonic clock at the server's last answer
        self._client: MlflowClient | None = None
        self._images: set[str] = set()

    def send_pending(self) -> int:
        """Send everything behind the cursor; returns the number of entries. Another process at the same work: 0.

        Raises whatever the client raises when the server is away; the cursor stands behind the last batch that it took.
        """
        try:
            with self.lock.acquire(timeout=0):
                client = self._connected()
                unsent = read_entries(self.journal, self.cursor.offset)
                return sum(self._send(client, batch) for batch in batches(unsent))
        except Timeout:
            return 0
        except Exception:
            self._client = None  # the next attempt looks the run up again: the server may have been replaced
            raise

    def ensure_run(self, timeout_s: float) -> "tuple[MlflowClient, str]":
        """The client and the id of the run, which is created if MLflow does not have it yet."""
        with self.lock.acquire(timeout=timeout_s):
            client = self._connected()
        assert self.cursor.mlflow_run_id
        return client, self.cursor.mlflow_run_id

    def pending(self) -> bool:
        return self.cursor.behind(self.journal)

    def run_page(self) -> str | None:
        """The run's page in MLflow's interface; None until the server has answered once."""
        if self.cursor.mlflow_run_id is None:
            return None
        return run_url(self.url, self.cursor.experiment_id or "", self.cursor.mlflow_run_id)

    def _connected(self) -> "MlflowClient":
        if self._client is not None:
            return self._client
        client = connect(self.url)
        self.cursor = Cursor.beside(self.journal)
        opening = next(read_entries(self.journal))
        experiment = _experiment(client, opening.body["experiment"])
        known = client.search_runs([experiment.experiment_id], f"tags.`{RUN_TAG}` = '{self.run_uid}'", max_results=1)
        run = (
            known[0]
            if known
            else client.create_run(
                experiment.experiment_id,
                start_time=opening.t_ms,
                run_name=opening.body["run_name"],
                tags={RUN_TAG: self.run_uid, "mlflow.source.name": "safelight"},
            )
        )
        if run.info.run_id != self.cursor.mlflow_run_id:  # a new run, or a server that has forgotten the old one
            self.cursor.offset = 0
        self.cursor.mlflow_run_id, self.cursor.experiment_id = run.info.run_id, experiment.experiment_id
        self._images = {
            Path(file.path).name.partition("+timestamp")[0]  # the small copy is the last file of an image
            for file in client.list_artifacts(run.info.run_id, "images")
            if file.path.endswith(".webp")
        }
        self._advance(self.cursor.offset)
        with self.bench.catalog.write() as session:
            session.execute(update(Run).where(Run.run_uid == self.run_uid).values(mlflow_run_id=run.info.run_id))
        self._client = client
        return client

    def _send(self, client: "MlflowClient", batch: Sequence[Entry]) -> int:
        try:
            self._log(client, batch)
        except Exception as error:
            if not is_refusal(error) and not isinstance(error, SafelightError):
                raise
            if len(batch) > 1:
                return sum(self._send(client, [entry]) for entry in batch)
            logger.warning("MLflow did not take %s of run %s: %s", batch[0].kind, self.run_uid, first_line(error))
        self._advance(batch[-1].end)
        return len(batch)

    def _advance(self, offset: int) -> None:
        self.cursor.offset = offset
        self.cursor.write()
        self.answered_at = time.monotonic()

    def _log(self, client: "MlflowClient", batch: Sequence[Entry]) -> None:
        run_id, entry = self.cursor.mlflow_run_id or "", batch[0]
        match entry.kind:
            case "metrics" | "params" | "tags":
                _log_batch(client, run_id, batch)
            case "image":
                self._log_image(client, run_id, entry)
            case "artifact":
                _log_file(client, run_id, entry.body["name"], self.bench.store.read(entry.body["sha256"]))
            case "document":
                _log_file(client, run_id, entry.body["name"], entry.body["text"].encode())
            case "dataset":
                client.log_inputs(run_id, datasets=[_dataset_input(**entry.body)])
            case "status" if entry.body["status"] == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            case "status":
                client.set_terminated(run_id, status=entry.body["status"], end_time=entry.t_ms)

    def _log_image(self, client: "MlflowClient", run_id: str, entry: Entry) -> None:
        from PIL import Image

        key, step = entry.body["key"], entry.body["step"]
        name = f"{key.replace('/', '~')}+step+{step}"  # as MLflow names the file, before the time and a random id
        if name not in self._images:
            with Image.open(BytesIO(self.bench.store.read(entry.body["sha256"])), formats=["PNG"]) as image:
                client.log_image(run_id, image, key=key, step=step, timestamp=entry.t_ms)
            self._images.add(name)


def _experiment(client: "MlflowClient", name: str) -> "Experiment":
    """A recipe's experiment, created with an artifact location: MLflow's default is whatever folder is current."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            where = f"mlflow-artifacts:/{name}"
            return client.get_experiment(client.create_experiment(name, artifact_location=where, tags=EXPERIMENT_TAGS))
        except MlflowException:  # somebody else was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found


def _log_batch(client: "MlflowClient", run_id: str, batch: Sequence[Entry]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run_id,
        metrics=[
            Metric(name, value, entry.t_ms, entry.body["step"])
            for entry in batch
            if entry.kind == "metrics"
            for name, value in entry.body["values"].items()
        ],
        params=[Param(name, value) for name, value in _latest(batch, "params").items()],
        tags=[RunTag(name, value) for name, value in _latest(batch, "tags").items()],
    )


def _latest(batch: Sequence[Entry], kind: str) -> dict[str, str]:
    return {name: value for entry in batch if entry.kind == kind for name, value in entry.body["values"].items()}


def _log_file(client: "MlflowClient", run_id: str, name: str, data: bytes) -> None:
    folder, _, file_name = name.rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / file_name
        path.write_bytes(data)
        client.log_artifact(run_id, str(path), folder or None)


def _dataset_input(name: str, digest: str, source: str, context: str) -> "DatasetInput":
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    dataset = MetaDataset(CodeDatasetSource({"source": source}), name=name, digest=digest)
    return DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
