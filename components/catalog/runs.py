"""Runs: opened first thing, told apart by a UUIDv7, never left in state running by a living process."""

import os
import socket
from typing import Any

from sqlalchemy import select, update
from uuid6 import uuid7

from components.catalog.database import Catalog
from components.catalog.models import Run, StageRun, now
from components.stages import StageResult


def open_run(
    catalog: Catalog,
    *,
    name: str,
    kind: str,
    recipe: dict[str, Any],
    git_commit: str | None,
    run_uid: str | None = None,
) -> str:
    """Insert a run in state running and return its uid; an existing uid (a retried flow) is taken up again."""
    run_uid = run_uid or str(uuid7())
    with catalog.write() as session:
        run = session.get(Run, run_uid)
        if run is None:
            run = Run(run_uid=run_uid, name=name, kind=kind, recipe=recipe, progress={}, card={})
            session.add(run)
        run.status, run.ended_at, run.error = "running", None, None
        run.host, run.pid, run.git_commit, run.heartbeat_at = socket.gethostname(), os.getpid(), git_commit, now()
    return run_uid


def update_run(catalog: Catalog, run_uid: str, **values: Any) -> None:
    """Set columns of a run; its heartbeat is set along."""
    with catalog.write() as session:
        session.execute(update(Run).where(Run.run_uid == run_uid).values(heartbeat_at=now(), **values))


def close_run(
    catalog: Catalog, run_uid: str, status: str, *, card: dict[str, Any] | None = None, error: str | None = None
) -> None:
    """End a run as completed, failed, stopped or crashed."""
    values: dict[str, Any] = {"status": status, "ended_at": now(), "error": error}
    update_run(catalog, run_uid, **values | ({"card": card} if card is not None else {}))


def record_stage(catalog: Catalog, run_uid: str, result: StageResult) -> None:
    """Write down how this run came by a stage's result."""
    with catalog.write() as session:
        session.merge(
            StageRun(
                run_uid=run_uid,
                stage=result.stage,
                key=result.key,
                outcome=result.outcome,
                seconds=result.seconds,
                items=result.product.items,
                bytes=result.bytes,
            )
        )


def running(catalog: Catalog) -> list[Run]:
    """Every run that the catalog believes to be running, oldest first."""
    with catalog.read() as session:
        return list(session.scalars(select(Run).where(Run.status == "running").order_by(Run.run_uid)))
