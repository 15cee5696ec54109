"""What a run tells about itself: settings, metric series, pictures, documents and how it ended."""

import json
import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

from components.errors import SafelightError
from components.stages import Bench
from flows.journal import Journal, journal_path, read_entries
from flows.tracking.background import SEND_EVERY_S, BackgroundSending
from flows.tracking.documents import as_text, evaluation_series, flatten, without_secrets
from flows.tracking.sender import Sender
from flows.tracking.server import DATASET_DIGEST_CHARACTERS, find_server

RunStatus = Literal["completed", "failed", "stopped", "crashed"]
MLFLOW_STATUS = {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "crashed": "KILLED"}

# MLflow's limits of one value
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
TEXTS_PER_ENTRY = 50  # an entry is sent whole, and a request takes a hundred of either kind

logger = logging.getLogger(__name__)


class Tracker:
    """Every method appends to the journal and returns; only `close` waits for MLflow."""

    def __init__(self, journal: Journal, sending: BackgroundSending | None):
        self._journal, self._sending = journal, sending
        self._seen = {
            (name, entry.body["step"])
            for entry in read_entries(journal.path)
            if entry.kind == "metrics"
            for name in entry.body["values"]
        }

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Points of metric series at one step; None is no point.

        A (name, step) that was told before is skipped, so a resumed run may walk over old steps again.
        """
        new = {
            name: float(value) for name, value in values.items() if value is not None and (name, step) not in self._seen
        }
        if new:
            self._seen.update((name, step) for name in new)
            self._journal.append("metrics", {"step": step, "values": new})

    def evaluation(self, metrics: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """An evaluation's metrics as `name/candidate`, `name/base`, `name/difference`, `name/difference/low`..."""
        self.metrics(step, evaluation_series(metrics))

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings, written once; a value longer than MLflow's 6,000 characters is cut."""
        self._texts("params", values, PARAM_CHARACTERS)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Words about the run; a later value replaces an earlier one, None is left out."""
        self._texts("tags", {name: value for name, value in values.items() if value is not None}, TAG_CHARACTERS)

    def _texts(self, kind: str, values: Mapping[str, Any], characters: int) -> None:
        texts = iter([(name, as_text(value, characters)) for name, value in values.items()])
        while part := dict(islice(texts, TEXTS_PER_ENTRY)):
            self._journal.append(kind, {"values": part})

    def image(self, key: str, png_sha256: str, step: int) -> None:
        """A small stored PNG under one of few fixed keys (`preview/0`...), shown by MLflow's grid step by step."""
        self._journal.append("image", {"key": key, "step": step, "sha256": png_sha256})

    def artifact(self, name: str, sha256: str) -> None:
        """A stored object as the run's artifact `name`, a relative path such as `evaluation/report.json`."""
        self._journal.append("artifact", {"name": name, "sha256": sha256})

    def document(self, name: str, value: Any) -> None:
        """A JSON value, without the secrets in its addresses, as the run's artifact `name`."""
        text = json.dumps(without_secrets(value), indent=2, ensure_ascii=False, default=str)
        self._journal.append("document", {"name": name, "text": text})

    def dataset(self, name: str, digest: str, source: str) -> None:
        """The data that went in, under our own digest: MLflow's sees neither pixels nor rows behind the 10,000th."""
        body = {"name": name, "digest": digest[:DATASET_DIGEST_CHARACTERS], "source": without_secrets(source)}
        self._journal.append("dataset", body | {"context": "train"})

    def sync(self) -> None:
        """Make the journal durable and ask for sending: called where a stage ends."""
        self._journal.sync()
        if self._sending:
            self._sending.wake()

    def close(self, status: RunStatus = "completed", *, timeout_s: float = 30.0) -> bool:
        """End the run. True when MLflow has everything; a server that does not answer is given up after two seconds."""
        try:
            self._journal.append("status", {"status": MLFLOW_STATUS[status]})
            self._journal.close()
        except (SafelightError, OSError) as error:  # a full disk has ended the run already; closing must not hide why
            logger.warning("the end of the run could not be journaled: %s", error)
        return self._sending.finish(timeout_s) if self._sending else False

    @property
    def mlflow_run_id(self) -> str | None:
        """None until the server has answered once."""
        return self._sending.sender.cursor.mlflow_run_id if self._sending else None

    @property
    def url(self) -> str | None:
        """The run's page, once it is known."""
        return self._sending.sender.run_page() if self._sending else None


def open_tracker(
    bench: Bench,
    run_uid: str,
    recipe: Mapping[str, Any],
    *,
    tags: Mapping[str, Any] | None = None,
    url: str | None = None,
    every_s: float = SEND_EVERY_S,
) -> Tracker:
    """Open a run's journal and start sending it in the background; returns at once, whether MLflow lives or not.

    `recipe` is a document whose "name" is the experiment's; it goes in as flat params (`training.rank`) and whole as
    `recipe.json`. A run that was opened before (a retried flow) is continued. Without a known MLflow the journal is
    kept for later.
    """
    journal = Journal(journal_path(bench.workspace, run_uid))
    url = url or find_server(bench.workspace)
    fresh = journal.empty
    if fresh:
        journal.append("run", {"experiment": recipe["name"], "run_name": f"{recipe['name']}-{run_uid[-6:]}"})
    else:
        journal.append("status", {"status": "RUNNING"})
    tracker = Tracker(journal, BackgroundSending(Sender(bench, run_uid, url), every_s) if url else None)
    if fresh:
        tracker.params(dict(flatten(recipe)))
        tracker.document("recipe.json", recipe)
    tracker.tags(tags or {})
    tracker.sync()
    return tracker
