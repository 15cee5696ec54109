"""The one file that talks to MLflow: runs, metric series, images, logged models, versions and aliases.

A run's `Tracker` only appends to the local journal. A background sender brings the journal to MLflow in batches and
remembers how far it got, so a dead or slow server never slows a run: whatever is left is sent by `catch_up`, once,
because every point carries the time it was journaled with. `python -m flows.tracking register` is the short child
that imports torch to log and register models.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from filelock import FileLock, Timeout
from sqlalchemy import update

from components.catalog.models import ModelVersion, Run
from components.config import Recipe
from components.errors import BadInput, SafelightError, ServiceUnavailable, StageFailed
from components.stages import Bench
from components.workspace import Workspace
from flows import services
from flows.journal import Entry, Journal, read_entries

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.entities import Run as MlflowRun

logger = logging.getLogger(__name__)

RUN_TAG = "safelight.run_uid"
RunStatus = Literal["completed", "failed", "stopped", "crashed"]
MLFLOW_STATUS = {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "crashed": "KILLED"}

# limits of one request to MLflow's log-batch endpoint, and of one value
BATCH_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}
BATCH_ENTITIES = 1000
BATCH_BYTES = 500_000  # estimated; non-ASCII text takes up to twice as much, and a request must stay below 1 MB
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
DIGEST_CHARACTERS = 36

MODEL_REQUIREMENTS = ("diffusers", "transformers", "torch", "peft", "safetensors", "accelerate")

SEND_EVERY_S = 5.0
RETRY_AT_MOST_EVERY_S = 30.0
DEAD_SERVER_GRACE_S = 2.0  # how long closing waits for a server that refused the last request
SILENT_SERVER_GRACE_S = 10.0  # and for one that has taken a request and not answered yet
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # the server will never take this entry: drop it, with a warning


def tracking_url(workspace: Workspace) -> str | None:
    """Where MLflow is: `SAFELIGHT_MLFLOW_URI`, `MLFLOW_TRACKING_URI`, or what `safelight up` last started here."""
    if url := os.environ.get("SAFELIGHT_MLFLOW_URI") or os.environ.get("MLFLOW_TRACKING_URI"):
        return url
    return services.current(workspace).mlflow_url or None


# the tracker of a run ---------------------------------------------------------------------------------------------


class Tracker:
    """What a run tells the tracker. Every method appends to the journal and returns; only `close` waits for MLflow."""

    def __init__(self, journal: Journal, sender: "Sender | None", *, every_s: float = SEND_EVERY_S):
        self._journal, self._sender = journal, sender
        self._seen = {(name, entry.body["step"]) for entry in read_entries(journal.path) if entry.kind == "metrics"
                      for name in entry.body["values"]}
        self._background = _Background(sender, every_s) if sender else None

    def metrics(self, step: int, values: Mapping[str, float | None], t_ms: int | None = None) -> None:
        """Points of metric series at one step; `t_ms` is Unix time in milliseconds, default now.

        A (name, step) that was told before is skipped, so a resumed run may walk over old steps again.
        """
        new = {name: float(value) for name, value in values.items()
               if value is not None and (name, step) not in self._seen}
        if new:
            self._seen.update((name, step) for name in new)
            self._journal.append("metrics", {"step": step, "values": new}, t_ms=t_ms)

    def evaluation(self, metrics: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """An evaluation's metrics as `name/candidate`, `name/base`, `name/difference`, `name/difference/low`..."""
        self.metrics(step, dict(_evaluation_series(metrics)))

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings, written once; a value longer than MLflow's 6,000 characters is cut."""
        for part in _chunks({name: _cut(value, PARAM_CHARACTERS) for name, value in values.items()}):
            self._journal.append("params", {"values": part})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Words about the run; a later value replaces an earlier one, None is left out."""
        kept = {name: _cut(value, TAG_CHARACTERS) for name, value in values.items() if value is not None}
        for part in _chunks(kept):
            self._journal.append("tags", {"values": part})

    def image(self, key: str, png_sha256: str, step: int) -> None:
        """A small stored PNG under one of few fixed keys (`preview/0`...), shown by MLflow's grid step by step."""
        self._journal.append("image", {"key": key, "step": step, "sha256": png_sha256})

    def artifact(self, name: str, sha256: str) -> None:
        """A stored object as the run's artifact `name`, a relative path such as `evaluation/report.json`."""
        self._journal.append("artifact", {"name": name, "sha256": sha256})

    def document(self, name: str, value: Any) -> None:
        """A JSON value as the run's artifact `name`."""
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        self._journal.append("document", {"name": name, "text": text})

    def dataset(self, name: str, digest: str, source: str, context: str = "train") -> None:
        """The data that went in, under our own digest: MLflow's sees neither pixels nor rows behind the 10,000th."""
        self._journal.append("dataset", {"name": name, "digest": digest[:32], "source": source, "context": context})

    def sync(self) -> None:
        """Make the journal durable and ask for sending: called where a stage ends."""
        self._journal.sync()
        if self._background:
            self._background.wake()

    def close(self, status: RunStatus = "completed", *, timeout_s: float = 30.0) -> bool:
        """End the run. True when MLflow has everything; a server that does not answer is given up after two seconds."""
        try:
            self._journal.append("status", {"status": MLFLOW_STATUS[status]})
            self._journal.close()
        except (SafelightError, OSError) as error:  # a full disk has ended the run already; closing must not hide why
            logger.warning("the end of the run could not be journaled: %s", error)
        return self._background.finish(timeout_s) if self._background else False

    @property
    def mlflow_run_id(self) -> str | None:
        """None until the server has answered once."""
        return self._sender.cursor.mlflow_run_id if self._sender else None

    @property
    def url(self) -> str | None:
        """The run's page, once it is known."""
        if self._sender is None or self._sender.cursor.mlflow_run_id is None:
            return None
        return run_url(self._sender.url, self._sender.cursor.experiment_id or "", self._sender.cursor.mlflow_run_id)


def open_tracker(bench: Bench, run_uid: str, recipe: Recipe, *, tags: Mapping[str, Any] | None = None,
                 url: str | None = None, every_s: float = SEND_EVERY_S) -> Tracker:
    """Open a run's journal and start sending it in the background; returns at once, whether MLflow lives or not.

    The recipe goes in as flat params (`training.rank`) and whole as `recipe.json`. A run that was opened before (a
    retried flow) is continued. Without a known MLflow the journal is kept for later.
    """
    journal = Journal(journal_path(bench, run_uid))
    url = url or tracking_url(bench.workspace)
    fresh = journal.empty
    if fresh:
        journal.append("run", {"experiment": recipe.name, "run_name": f"{recipe.name}-{run_uid[-6:]}"})
    else:
        journal.append("status", {"status": "RUNNING"})
    tracker = Tracker(journal, Sender(bench, run_uid, url) if url else None, every_s=every_s)
    if fresh:
        body = recipe.model_dump(mode="json")
        tracker.params(dict(flatten(body)))
        tracker.document("recipe.json", body)
    tracker.tags(dict(tags or {}))
    tracker.sync()
    return tracker


def journal_path(bench: Bench, run_uid: str) -> Path:
    return bench.workspace.run_dir(run_uid) / "journal.jsonl"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested document as dotted names: {"training": {"rank": 4}} gives ("training.rank", 4), lists count from 0."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, item in value.items():
        yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))


def _evaluation_series(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float | None]]:
    for name, metric in metrics.items():
        for role in ("candidate", "base", "champion"):
            yield f"{name}/{role}", metric.get(role)
        difference = metric.get("difference") or {}
        for part, suffix in (("value", ""), ("low", "/low"), ("high", "/high")):
            yield f"{name}/difference{suffix}", difference.get(part)


def _cut(value: Any, characters: int) -> str:
    text = str(value)
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _chunks(values: dict[str, str], size: int = 50) -> Iterator[dict[str, str]]:
    items = list(values.items())
    return (dict(items[start:start + size]) for start in range(0, len(items), size))


# sending a journal ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Cursor:
    """How far a journal was sent (`offset` in bytes), and to which MLflow run. Losing it costs sending twice."""

    path: Path
    offset: int = 0
    mlflow_run_id: str | None = None
    experiment_id: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Cursor":
        try:
            body = json.loads(path.read_text())
            return cls(path, int(body["offset"]), body["mlflow_run_id"], body["experiment_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path)

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"offset": self.offset, "mlflow_run_id": self.mlflow_run_id,
                                    "experiment_id": self.experiment_id}))
        part.replace(self.path)


class Sender:
    """Brings the journal of one run to one MLflow server. Sending anything a second time changes nothing there."""

    def __init__(self, bench: Bench, run_uid: str, url: str):
        self.bench, self.run_uid, self.url = bench, run_uid, url
        self.journal = journal_path(bench, run_uid)
        self.cursor = Cursor.read(self.journal.with_name("mlflow-cursor.json"))
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
                client = self._connect()
                unsent = read_entries(self.journal, self.cursor.offset)
                return sum(self._send(client, batch) for batch in batches(unsent))
        except Timeout:
            return 0
        except Exception:
            self._client = None  # the next attempt looks the run up again: the server may have been replaced
            raise

    def connect(self, timeout_s: float) -> "tuple[MlflowClient, str]":
        """The client and the id of the run, which is created if MLflow does not have it yet."""
        with self.lock.acquire(timeout=timeout_s):
            client = self._connect()
        assert self.cursor.mlflow_run_id
        return client, self.cursor.mlflow_run_id

    def pending(self) -> bool:
        return next(read_entries(self.journal, self.cursor.offset), None) is not None

    def _connect(self) -> "MlflowClient":
        if self._client is not None:
            return self._client
        client = _client(self.url)
        self.cursor = Cursor.read(self.cursor.path)
        opening = next(read_entries(self.journal))
        experiment = _experiment(client, opening.body["experiment"])
        run = _find_run(client, self.run_uid, [experiment.experiment_id]) or client.create_run(
            experiment.experiment_id, start_time=opening.t_ms, run_name=opening.body["run_name"],
            tags={RUN_TAG: self.run_uid, "mlflow.source.name": "safelight"})
        if run.info.run_id != self.cursor.mlflow_run_id:  # a new run, or a server that has forgotten the old one
            self.cursor.offset = 0
        self.cursor.mlflow_run_id, self.cursor.experiment_id = run.info.run_id, experiment.experiment_id
        self._images = {Path(file.path).name.partition("+timestamp")[0]  # the small copy is the last file of an image
                        for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".webp")}
        self._advance(self.cursor.offset)
        with self.bench.catalog.write() as session:
            session.execute(update(Run).where(Run.run_uid == self.run_uid).values(mlflow_run_id=run.info.run_id))
        self._client = client
        return client

    def _send(self, client: "MlflowClient", batch: Sequence[Entry]) -> int:
        try:
            self._log(client, batch)
        except Exception as error:
            if getattr(error, "error_code", None) not in REFUSALS and not isinstance(error, SafelightError):
                raise
            if len(batch) > 1:
                return sum(self._send(client, [entry]) for entry in batch)
            logger.warning("MLflow did not take %s of run %s: %s", batch[0].kind, self.run_uid, _first_line(error))
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
                self._log_batch(client, run_id, batch)
            case "image":
                self._log_image(client, run_id, entry)
            case "artifact":
                data = self.bench.store.read(entry.body["sha256"])
                _log_file(client, run_id, entry.body["name"], data)
            case "document":
                _log_file(client, run_id, entry.body["name"], entry.body["text"].encode())
            case "dataset":
                client.log_inputs(run_id, datasets=[_dataset_input(**entry.body)])
            case "status":
                if entry.body["status"] == "RUNNING":
                    client.update_run(run_id, status="RUNNING")
                else:
                    client.set_terminated(run_id, status=entry.body["status"], end_time=entry.t_ms)

    def _log_batch(self, client: "MlflowClient", run_id: str, batch: Sequence[Entry]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client.log_batch(
            run_id,
            metrics=[Metric(name, value, entry.t_ms, entry.body["step"]) for entry in batch if entry.kind == "metrics"
                     for name, value in entry.body["values"].items()],
            params=[Param(name, value) for name, value in _merged(batch, "params").items()],
            tags=[RunTag(name, value) for name, value in _merged(batch, "tags").items()],
        )

    def _log_image(self, client: "MlflowClient", run_id: str, entry: Entry) -> None:
        from io import BytesIO

        from PIL import Image

        key, step = entry.body["key"], entry.body["step"]
        name = f"{key.replace('/', '~')}+step+{step}"  # as MLflow names the file, before the time and a random id
        if name not in self._images:
            with Image.open(BytesIO(self.bench.store.read(entry.body["sha256"])), formats=["PNG"]) as image:
                client.log_image(run_id, image, key=key, step=step, timestamp=entry.t_ms)
            self._images.add(name)


def batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Group a journal for sending, in order: metrics, params and tags up to one request's limits, the rest alone."""
    batch: list[Entry] = []
    counts, size = dict.fromkeys(BATCH_LIMITS, 0), 0
    for entry in entries:
        number, weight = len(entry.body.get("values", ())), _weight(entry)
        together = entry.kind in BATCH_LIMITS
        if batch and not (together and counts[entry.kind] + number <= BATCH_LIMITS[entry.kind]
                          and sum(counts.values()) + number <= BATCH_ENTITIES and size + weight <= BATCH_BYTES):
            yield batch
            batch, counts, size = [], dict.fromkeys(BATCH_LIMITS, 0), 0
        if together:
            batch.append(entry)
            counts[entry.kind] += number
            size += weight
        elif entry.kind != "run":
            yield [entry]
    if batch:
        yield batch


def _weight(entry: Entry) -> int:
    """Roughly the bytes of an entry in the request; a point of a series takes about 100 around its name."""
    return sum(100 + len(name) + len(str(value)) for name, value in entry.body.get("values", {}).items())


def _merged(batch: Sequence[Entry], kind: str) -> dict[str, str]:
    return {name: value for entry in batch if entry.kind == kind for name, value in entry.body["values"].items()}


class _Background:
    """A daemon thread that sends every few seconds, slower while the server is away, and once more at the end."""

    def __init__(self, sender: Sender, every_s: float):
        self._sender, self._every_s = sender, every_s
        self._awake, self._closing = threading.Event(), threading.Event()
        self.settled = threading.Event()  # after the first attempt, successful or not
        self._failing, self._ready = False, False
        self._thread = threading.Thread(target=self._run, name=f"mlflow {sender.run_uid}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._awake.set()

    def finish(self, timeout_s: float) -> bool:
        began = time.monotonic()
        self._closing.set()
        self._awake.set()
        while self._thread.is_alive() and time.monotonic() - began < timeout_s:
            self._thread.join(0.05)
            grace = DEAD_SERVER_GRACE_S if self._failing else SILENT_SERVER_GRACE_S
            if self._ready and time.monotonic() - max(began, self._sender.answered_at or began) > grace:
                break
        sent = not self._thread.is_alive() and not self._sender.pending()
        if not sent:
            logger.warning("MLflow at %s does not answer; what is left of run %s is sent when `safelight doctor` finds "
                           "it back", self._sender.url, self._sender.run_uid)
        return sent

    def _run(self) -> None:
        delay = self._every_s
        _import_mlflow()
        self._ready = True
        while True:
            closing = self._closing.is_set()
            try:
                self._sender.send_pending()
                self._failing, delay = False, self._every_s
                if closing and not self._sender.pending():
                    return
            except Exception as error:
                if not self._failing:
                    logger.warning("MLflow at %s does not take run %s for now, the journal keeps it: %s",
                                   self._sender.url, self._sender.run_uid, _first_line(error))
                self._failing, delay = True, min(2 * delay, RETRY_AT_MOST_EVERY_S)
            self.settled.set()
            self._awake.wait(0.5 if closing else delay)
            self._awake.clear()


def catch_up(bench: Bench, run_uid: str, *, url: str | None = None) -> int:
    """Send what an outage or a crash left of a run's journal; returns the number of entries sent.

    Raises ServiceUnavailable when MLflow is away (now or half-way: the next call goes on from there).
    """
    address = _known(bench.workspace, url)
    sender = Sender(bench, run_uid, address)
    with _reaching(address):
        return sender.send_pending() if sender.pending() else 0


def pending(bench: Bench) -> list[str]:
    """The runs whose journal holds something that MLflow does not have yet, oldest first."""
    journals = sorted((bench.workspace.home / "runs").glob("*/journal.jsonl"))
    return [path.parent.name for path in journals
            if next(read_entries(path, Cursor.read(path.with_name("mlflow-cursor.json")).offset), None)]


def heal(bench: Bench, *, url: str | None = None) -> list[tuple[str, str]]:
    """End the MLflow runs that say RUNNING while the catalog knows better; returns (run_uid, new status) of each."""
    address = _known(bench.workspace, url)
    healed = []
    with _reaching(address):
        client = _client(address)
        for run in _tagged_runs(client, "attributes.status = 'RUNNING'"):
            run_uid = run.data.tags[RUN_TAG]
            with bench.catalog.read() as session:
                known = session.get(Run, run_uid)
            if known is not None and known.status in MLFLOW_STATUS:
                ended = int(known.ended_at.timestamp() * 1000) if known.ended_at else None
                client.set_terminated(run.info.run_id, status=MLFLOW_STATUS[known.status], end_time=ended)
                healed.append((run_uid, MLFLOW_STATUS[known.status]))
    return healed


# MLflow's client --------------------------------------------------------------------------------------------------


def _import_mlflow() -> None:
    """Import the client, quiet, and without its own retries: it would repeat a creation whose answer was lost."""
    for name, value in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("DO_NOT_TRACK", "true"),
                        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
                        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
                        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")):
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401


def _client(url: str) -> "MlflowClient":
    _import_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url, registry_uri=url)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn whatever the client raises for a server that is away into the one error with the mend."""
    try:
        yield
    except Exception as error:
        from mlflow.exceptions import MlflowException

        if getattr(error, "error_code", None) in REFUSALS:
            raise StageFailed(f"MLflow at {url} refused the request: {_first_line(error)}") from error
        if isinstance(error, MlflowException | OSError):  # requests' exceptions are OSErrors
            raise ServiceUnavailable(f"MLflow at {url}: {_first_line(error)}; start it with `safelight up`") from error
        raise


def _known(workspace: Workspace, url: str | None) -> str:
    url = url or tracking_url(workspace)
    if url is None:
        raise ServiceUnavailable("no MLflow server is known for this workspace; start one with `safelight up`")
    return url


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def _experiment(client: "MlflowClient", name: str) -> "Experiment":
    """A recipe's experiment, created with an artifact location: MLflow's default is whatever folder is current."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.get_experiment(client.create_experiment(name, artifact_location=f"mlflow-artifacts:/{name}"))
        except MlflowException:  # somebody else was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found


def _find_run(client: "MlflowClient", run_uid: str, experiment_ids: list[str]) -> "MlflowRun | None":
    found = client.search_runs(experiment_ids, f"tags.`{RUN_TAG}` = '{run_uid}'", max_results=1)
    return found[0] if found else None


def _tagged_runs(client: "MlflowClient", condition: str) -> "list[MlflowRun]":
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [] if not experiments else list(
        client.search_runs(experiments, f"{condition} and tags.`{RUN_TAG}` LIKE '%'", max_results=1000))


def _log_file(client: "MlflowClient", run_id: str, name: str, data: bytes) -> None:
    folder, _, file_name = name.rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / file_name
        path.write_bytes(data)
        client.log_artifact(run_id, str(path), folder or None)


def _dataset_input(name: str, digest: str, source: str, context: str) -> Any:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    dataset = MetaDataset(CodeDatasetSource({"source": source}), name=name, digest=digest[:DIGEST_CHARACTERS])
    return DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])


# the registry -----------------------------------------------------------------------------------------------------


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
    """What the registering child is told, as one JSON line."""

    home: str
    url: str
    run_uid: str
    name: str
    base_path: str
    checkpoints: list[dict[str, Any]]
    final_sha256: str
    dataset: tuple[str, str] | None
    tags: dict[str, str]
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    params: dict[str, str]
    metrics: dict[str, float]  # of the final checkpoint


def register_model(bench: Bench, *, run_uid: str, name: str, base_path: Path, checkpoints: Sequence[Checkpoint],
                   final_sha256: str, resolution: int, num_inference_steps: int, guidance_scale: float,
                   metrics: Mapping[str, Mapping[str, Any]] | None = None, dataset: tuple[str, str] | None = None,
                   tags: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None,
                   url: str | None = None, timeout_s: float = 600.0) -> Registration:
    """Log every checkpoint as a model of the run, register the final one and point the alias challenger at it.

    The work is done by a child that imports torch and dies with this process; what a killed child left is taken up,
    not repeated. Metrics that the run's journal holds at a checkpoint's step are attached to its model, and `metrics`,
    an evaluation's document, to the final one. `base_path` is a folder in diffusers layout, `dataset` (name, digest) of
    the snapshot; tags without a dot get the prefix `safelight.`. Raises ServiceUnavailable when MLflow is away,
    StageFailed when the child ends otherwise.
    """
    request = RegistrationRequest(
        home=str(bench.workspace.home), url=_known(bench.workspace, url), run_uid=run_uid, name=name,
        base_path=str(Path(base_path).resolve()), checkpoints=[asdict(checkpoint) for checkpoint in checkpoints],
        final_sha256=final_sha256, dataset=dataset, resolution=resolution, num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale, params={key: str(value) for key, value in (params or {}).items()},
        tags={key if "." in key else f"safelight.{key}": str(value) for key, value in (tags or {}).items()
              if value is not None},
        metrics={key: value for key, value in _evaluation_series(metrics or {}) if value is not None})
    answer = _run_child(asdict(request), timeout_s)
    answer["model_ids"] = {int(step): model_id for step, model_id in answer["model_ids"].items()}
    registration = Registration(**answer)
    mirror_versions(bench, name, url=request.url)
    return registration


def _run_child(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    child = subprocess.Popen([sys.executable, "-m", "flows.tracking", "register"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, start_new_session=True, text=True,
                             cwd=Path(__file__).parents[1])
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
        raise StageFailed(f"registering with MLflow ended with exit code {child.returncode} and no answer; "
                          "the log above says why, and running again goes on from there") from None
    if "error" in body:
        raise (ServiceUnavailable if body["type"] == "ServiceUnavailable" else StageFailed)(body["error"])
    return body


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _register(request: RegistrationRequest) -> dict[str, Any]:
    """The child's work, tried again after a request that was not answered; torch and diffusers are imported here."""
    os.environ |= {"MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true", "MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}
    for pause_s in (1, 5):
        try:
            return _register_once(request)
        except ServiceUnavailable as error:
            logger.warning("%s; trying again", error)
            time.sleep(pause_s)
    return _register_once(request)


def _register_once(request: RegistrationRequest) -> dict[str, Any]:
    _import_mlflow()
    import mlflow

    bench = Bench.open(Workspace(Path(request.home)))
    with _reaching(request.url):
        mlflow.set_tracking_uri(request.url)
        client, run_id = Sender(bench, request.run_uid, request.url).connect(timeout_s=60)
        model_ids = {checkpoint["step"]: _log_checkpoint(client, bench, request, run_id, Checkpoint(**checkpoint))
                     for checkpoint in request.checkpoints}
        final_step = next(c["step"] for c in request.checkpoints if c["sha256"] == request.final_sha256)
        number = _register_version(client, request, model_ids[final_step])
        if not _has_moved_on(client, request.name, number):
            client.set_registered_model_alias(request.name, "challenger", str(number))
    return {"name": request.name, "version": number, "uri": f"models:/{request.name}/{number}", "model_ids": model_ids,
            "mlflow_run_id": run_id}


def _log_checkpoint(client: "MlflowClient", bench: Bench, request: RegistrationRequest, run_id: str,
                    checkpoint: Checkpoint) -> str:
    from mlflow.diffusers import save_model
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    run = client.get_run(run_id)
    identity = {RUN_TAG: request.run_uid, "safelight.adapter_sha256": checkpoint.sha256,
                "safelight.step": str(checkpoint.step)}
    condition = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_logged_models([run.info.experiment_id], condition)
    model = found[0] if found else client.create_logged_model(
        run.info.experiment_id, name=f"{request.name}-step-{checkpoint.step}", source_run_id=run_id, model_type="lora",
        tags=request.tags | identity, params=request.params)
    if model.status != LoggedModelStatus.READY:
        adapter = bench.store.read(checkpoint.sha256)
        with tempfile.TemporaryDirectory() as scratch:
            weights, folder = Path(scratch) / "pytorch_lora_weights.safetensors", Path(scratch) / "model"
            weights.write_bytes(adapter)
            save_model(
                str(weights), str(folder), base_model=request.base_path, signature=_signature(request),
                pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in MODEL_REQUIREMENTS],
                mlflow_model=Model(artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id,
                                   model_id=model.model_id))
            client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    if model.model_id not in {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=checkpoint.step)])
    _attach_metrics(client, bench, request, checkpoint, model)
    return model.model_id


def _attach_metrics(client: "MlflowClient", bench: Bench, request: RegistrationRequest, checkpoint: Checkpoint,
                    model: Any) -> None:
    """The run's own points at this step with their own times: MLflow keeps one copy in the series, one at the model."""
    from mlflow.entities import Metric

    name, digest = request.dataset or (None, None)
    points = {key: (value, entry.t_ms) for entry in read_entries(journal_path(bench, request.run_uid))
              if entry.kind == "metrics" and entry.body["step"] == checkpoint.step
              for key, value in entry.body["values"].items()}
    if checkpoint.sha256 == request.final_sha256:
        points = {key: (value, model.creation_timestamp) for key, value in request.metrics.items()} | points
    if points:
        client.log_batch(model.source_run_id, metrics=[
            Metric(key, value, t_ms, checkpoint.step, model_id=model.model_id, dataset_name=name,
                   dataset_digest=digest[:32] if digest else None, run_id=model.source_run_id)
            for key, (value, t_ms) in list(points.items())[:BATCH_ENTITIES]])


def _signature(request: RegistrationRequest) -> Any:
    """MLflow's own signature draws 30 steps of 512 pixels; this one draws as the evaluation did."""
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import ColSpec

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema([
            ParamSpec("num_inference_steps", DataType.integer, request.num_inference_steps),
            ParamSpec("guidance_scale", DataType.double, float(request.guidance_scale)),
            ParamSpec("height", DataType.integer, request.resolution),
            ParamSpec("width", DataType.integer, request.resolution),
            ParamSpec("negative_prompt", DataType.string, ""),
        ]))


def _register_version(client: "MlflowClient", request: RegistrationRequest, model_id: str) -> int:
    import mlflow

    tags = request.tags | {RUN_TAG: request.run_uid, "safelight.adapter_sha256": request.final_sha256}
    for found in _versions(client, request.name):
        if all(found.tags.get(key) == tags[key] for key in (RUN_TAG, "safelight.adapter_sha256")):
            return int(found.version)
    return int(mlflow.register_model(f"models:/{model_id}", request.name, tags=tags).version)


def _has_moved_on(client: "MlflowClient", name: str, number: int) -> bool:
    """Whether this version was promoted, or a newer one challenges: registering again moves no alias back."""
    found = _aliases(client, name)
    return number in (found.get("champion"), found.get("previous")) or found.get("challenger", 0) > number


def _versions(client: "MlflowClient", name: str) -> list[Any]:
    from mlflow.exceptions import MlflowException

    try:
        return list(client.search_model_versions(f"name = '{name}'", max_results=1000))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise


def _aliases(client: "MlflowClient", name: str) -> dict[str, int]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def aliases(workspace: Workspace, name: str, *, url: str | None = None) -> dict[str, int]:
    """Where `champion`, `challenger` and `previous` point; empty for a name that was never registered."""
    address = _known(workspace, url)
    with _reaching(address):
        return _aliases(_client(address), name)


def registered(workspace: Workspace, name: str, version: int, *, url: str | None = None) -> dict[str, str] | None:
    """The tags of a registered version, or None when there is no such version."""
    address = _known(workspace, url)
    with _reaching(address):
        versions = _versions(_client(address), name)
    return next((dict(found.tags) for found in versions if int(found.version) == version), None)


def set_champion(workspace: Workspace, name: str, version: int, *, url: str | None = None) -> int | None:
    """Point champion at a version; the champion so far becomes previous and is returned.

    `previous` is written first, so a run that dies between the writes is mended by doing it again.
    """
    address = _known(workspace, url)
    if registered(workspace, name, version, url=address) is None:
        raise BadInput(f"model {name!r} has no version {version}; `safelight runs` lists what was registered")
    with _reaching(address):
        client = _client(address)
        before = _aliases(client, name)
        champion = before.get("champion")
        if champion is not None and champion != version:
            client.set_registered_model_alias(name, "previous", str(champion))
        client.set_registered_model_alias(name, "champion", str(version))
        if before.get("challenger") == version:
            client.delete_registered_model_alias(name, "challenger")
    return champion if champion != version else before.get("previous")


def mirror_versions(bench: Bench, name: str, *, url: str | None = None) -> dict[str, int]:
    """Copy a model's versions and aliases from the registry into the catalog; returns the aliases."""
    address = _known(bench.workspace, url)
    with _reaching(address):
        client = _client(address)
        found, versions = _aliases(client, name), _versions(client, name)
    with bench.catalog.write() as session:
        for one in versions:
            if RUN_TAG in one.tags:
                number = int(one.version)
                row = session.get(ModelVersion, (name, number)) or ModelVersion(name=name, version=number)
                row.run_uid, row.adapter_sha256 = one.tags[RUN_TAG], one.tags.get("safelight.adapter_sha256", "")
                row.evaluation_key = one.tags.get("safelight.evaluation_key", "")
                row.mlflow_uri = f"models:/{name}/{number}"
                row.aliases = sorted(alias for alias, target in found.items() if target == number)
                session.add(row)
    return found


# pages of MLflow's interface --------------------------------------------------------------------------------------


def run_url(url: str, experiment_id: str, mlflow_run_id: str) -> str:
    return f"{url.rstrip('/')}/#/experiments/{experiment_id}/runs/{mlflow_run_id}"


def model_url(url: str, name: str, version: int | None = None) -> str:
    page = f"{url.rstrip('/')}/#/models/{quote(name, safe='')}"
    return page if version is None else f"{page}/versions/{version}"


def compare_url(url: str, experiment_ids: Sequence[str], mlflow_run_ids: Sequence[str]) -> str:
    runs, experiments = quote(json.dumps(list(mlflow_run_ids))), quote(json.dumps(list(experiment_ids)))
    return f"{url.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"


# the child --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str], work: Callable[[RegistrationRequest], dict[str, Any]] = _register) -> int:
    """`python -m flows.tracking register`: one JSON request on stdin, one JSON answer on stdout, logs on stderr."""
    if list(arguments) != ["register"]:
        print("usage: python -m flows.tracking register < request.json", file=sys.stderr)
        return 2
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is a log
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    request = RegistrationRequest(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        answer = work(request)
    except Exception as error:
        logger.exception("registration failed")
        answer = {"type": type(error).__name__, "error": _first_line(error)}
    print(json.dumps(answer), file=answers, flush=True)
    return 1 if "error" in answer else 0


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(137)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
