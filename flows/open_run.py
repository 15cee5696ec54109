"""A run while it lasts: its catalog row, its journal, its torch child, and the passage through each stage."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from components.catalog import runs
from components.config import Recipe
from components.errors import SafelightError, Stopped
from components.families.bases import BaseModel, resolve_base
from components.stages import Bench, Product, StageResult, ensure
from components.storage import lack_of_room
from components.workspace import Workspace
from flows.children import ROOT, TorchChild, threads_for
from flows.tracking import recovery
from flows.tracking.tracker import Tracker, open_tracker

PROGRESS_EVERY_S = 0.5
SERIES = {
    "loss",
    "learning_rate",
    "grad_norm",
    "skipped_steps",
    "images_per_second",
    "validation_loss",
    "validation_ratio",
}
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class OpenRun:
    """What the steps of one execution share. `stage` is the only way through which they touch the cache."""

    bench: Bench
    recipe: Recipe
    run_uid: str
    base: BaseModel
    child: TorchChild
    tracker: Tracker
    on_event: OnEvent
    verify: bool = False  # hash also what is known to be unchanged
    results: dict[str, StageResult] = field(default_factory=dict)
    _reported: float = 0.0

    def stage(self, stage: str, key: str, produce: Callable[[], Product], **checks: Any) -> StageResult:
        """Reuse or produce a stage's result, and write down which it was."""
        runs.update_run(self.bench.catalog, self.run_uid, progress={"stage": stage})
        result = ensure(self.bench, stage, key, produce, run_uid=self.run_uid, verify=self.verify, **checks)
        self.results[stage] = result
        runs.record_stage(self.bench.catalog, self.run_uid, result)
        self.tracker.metrics(0, {f"seconds/{stage}": result.seconds})
        self.tracker.sync()
        self.on_event({"event": "stage", **stage_line(result)})
        return result

    def ask(self, request: dict[str, Any]) -> Product:
        """Let the torch child work on a request, relaying its events to the journal, the live view and the caller."""
        return self.child.ask(request, self.relay)

    def relay(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "metrics":
                self.tracker.metrics(event["step"], {name: event[name] for name in SERIES & event.keys()})
            case "preview":
                self.tracker.image(event["key"], event["sha256"], event["step"])
            case "progress" if time.monotonic() - self._reported > PROGRESS_EVERY_S:
                self._reported = time.monotonic()
                runs.update_run(
                    self.bench.catalog,
                    self.run_uid,
                    progress={name: event[name] for name in ("stage", "done", "total")},
                )
        self.on_event(event)


def stage_line(result: StageResult) -> dict[str, Any]:
    """A stage as the run card lists it; "name" and "stage" are the same word."""
    return {
        "name": result.stage,
        "stage": result.stage,
        "key": result.key,
        "outcome": result.outcome,
        "seconds": round(result.seconds, 3),
        "items": result.product.items,
        "bytes": result.bytes,
    }


@contextmanager
def open_run(
    recipe: Recipe, *, run_uid: str | None, kind: str, on_event: OnEvent, tags: dict[str, str], verify: bool = False
) -> Iterator[OpenRun]:
    """Open a retraining, and close it as completed, failed or stopped whatever happens inside."""
    bench = Bench.open(Workspace.from_environment())
    bench.catalog.migrate()
    base = resolve_base(recipe.base)
    document = recipe.model_dump(mode="json")
    with recorded(bench, document, kind=kind, run_uid=run_uid, tags=tags) as (uid, tracker):
        on_event({"event": "run", "run_uid": uid})
        log = bench.workspace.run_dir(uid) / "torch.log"
        with TorchChild(bench.workspace, log, threads=threads_for(base)) as child:
            yield OpenRun(bench, recipe, uid, base, child, tracker, on_event, verify)


@contextmanager
def recorded(
    bench: Bench,
    recipe: dict[str, Any],
    *,
    kind: str,
    run_uid: str | None = None,
    tags: dict[str, str] | None = None,
) -> Iterator[tuple[str, Tracker]]:
    """A run of any kind in the catalog and in MLflow, ended in both as what happened inside; gives uid and tracker.

    `recipe` is the document of its settings; its "name" is the run's. An existing `run_uid` is taken up again.
    """
    commit = git_commit()
    run_uid = runs.open_run(
        bench.catalog, name=recipe["name"], kind=kind, recipe=recipe, git_commit=commit, run_uid=run_uid
    )
    tracker = open_tracker(bench, run_uid, recipe, tags=(tags or {}) | ({"git_commit": commit} if commit else {}))
    status, error = "failed", None
    try:
        yield run_uid, tracker
        status = "completed"
    except (Stopped, KeyboardInterrupt) as cause:
        status, error = "stopped", str(cause) or "interrupted"
        raise
    except SafelightError as cause:
        error = str(cause)
        raise
    except BaseException as cause:
        status = "stopped" if type(cause).__name__ == "TerminationSignal" else "failed"
        error = str(lack_of_room(cause, bench.workspace.home) or f"{type(cause).__name__}: {cause}")
        raise
    finally:
        reached = tracker.close(status)
        runs.close_run(bench.catalog, run_uid, status, error=error)
        runs.update_run(bench.catalog, run_uid, mlflow_run_id=tracker.mlflow_run_id)
        if reached:
            _send_what_outages_left(bench)


def _send_what_outages_left(bench: Bench) -> None:
    """Bring MLflow the journals of earlier runs that ended while it was away."""
    at_work = {run.run_uid for run in runs.running(bench.catalog)}
    for run_uid in recovery.pending(bench):
        if run_uid not in at_work:
            with suppress(SafelightError):  # the next run or `safelight doctor --fix` tries once more
                recovery.catch_up(bench, run_uid)


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises Stopped in the main thread, so that every `finally` runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Stopped("stopped by SIGTERM; run the same command to continue")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def git_commit() -> str | None:
    """The commit of this checkout, 40 hex digits, or None outside a repository."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
