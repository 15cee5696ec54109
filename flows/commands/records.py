"""Runs that were: runs, show, logs, stop."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.errors import BadInput
from flows.commands.opening import SCHEMA, AsJson, open_bench, open_reporter

if TYPE_CHECKING:
    from components.catalog.models import Run
    from components.stages import Bench

STOP_PATIENCE_S = 60.0


def runs(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20, as_json: AsJson = False
) -> None:
    """The newest runs."""
    with open_reporter(as_json) as reporter:
        bench = open_bench()
        rows = _newest_runs(bench, limit)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "runs": [run_document(run) for run in rows]},
            lambda: reporter.table(
                ("run", "name", "kind", "status", "began", "gate", "model", "where it is"),
                [
                    (
                        run.run_uid,
                        run.name,
                        run.kind,
                        run.status,
                        f"{run.created_at:%Y-%m-%d %H:%M}",
                        (run.card.get("gate") or {}).get("decision"),
                        (run.card.get("model") or {}).get("version"),
                        progress_in_words(run) or run.error,
                    )
                    for run in rows
                ],
            ),
        )


def show(
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|FILE|MODEL", help="The start of a run's uid, an adapter file, or a model's name."),
    ],
    as_json: AsJson = False,
) -> None:
    """Everything known about a run, an adapter file or a registered model."""
    with open_reporter(as_json) as reporter:
        from flows import showing

        if what.endswith(".safetensors") or Path(what).is_file():
            showing.show_file(reporter, Path(what))
            return
        bench = open_bench()
        run = find_run(bench, what, required=False)
        if run is not None:
            showing.show_run(reporter, bench, run)
        else:
            showing.show_model(reporter, bench, what)


def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The start of a run's uid.")],
    lines: Annotated[int, typer.Option(min=1, help="How many lines at most, the last ones.")] = 200,
    as_json: AsJson = False,
) -> None:
    """What a run said."""
    with open_reporter(as_json) as reporter:
        from flows import showing

        bench = open_bench()
        row = find_run(bench, run)
        told = showing.log_lines(bench, row.run_uid)[-lines:]
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "run_uid": row.run_uid, "lines": told},
            lambda: reporter.say("\n".join(told) or "nothing was written down"),
        )


def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The start of a run's uid.")], as_json: AsJson = False
) -> None:
    """Ask a run to save what it has and end; wait until it has."""
    with open_reporter(as_json) as reporter:
        bench = open_bench()
        row = find_run(bench, run)
        told = _stop_run(bench, row)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "run_uid": row.run_uid, "outcome": told},
            lambda: reporter.say(f"{row.run_uid}: {told}"),
        )


def _newest_runs(bench: "Bench", limit: int) -> list["Run"]:
    from sqlalchemy import select

    from components.catalog.models import Run

    with bench.catalog.read() as session:
        return list(session.scalars(select(Run).order_by(Run.run_uid.desc()).limit(limit)))


def find_run(bench: "Bench", start: str, *, required: bool = True) -> Any:
    """The run whose uid begins with `start`; BadInput when none or several do."""
    from sqlalchemy import select

    from components.catalog.models import Run

    with bench.catalog.read() as session:
        found = list(session.scalars(select(Run).where(Run.run_uid.startswith(start, autoescape=True)).limit(2)))
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{start!r} is the start of several runs; give more of the uid (`safelight runs` lists them)")
    if required:
        raise BadInput(f"no run's uid begins with {start!r}; `safelight runs` lists them")
    return None


def run_document(run: "Run") -> dict[str, Any]:
    return {
        "run_uid": run.run_uid,
        "name": run.name,
        "kind": run.kind,
        "status": run.status,
        "created_at": run.created_at,
        "ended_at": run.ended_at,
        "host": run.host,
        "pid": run.pid,
        "progress": run.progress,
        "error": run.error,
        "gate": run.card.get("gate"),
        "model": run.card.get("model"),
        "urls": run.card.get("urls"),
    }


def progress_in_words(run: "Run") -> str:
    if run.status != "running" or not run.progress:
        return ""
    from flows.console import counted

    done, total = run.progress.get("done"), run.progress.get("total")
    return f"{run.progress.get('stage', '')} {'' if done is None else counted(done, total)}"


def _stop_run(bench: "Bench", run: "Run") -> str:
    import psutil

    from components.catalog import runs as run_rows
    from flows.reconcile import process_of

    if run.status != "running":
        return f"is not running, it is {run.status}"
    process = process_of(run)
    if process is None:
        raise BadInput(
            f"{run.run_uid}: its process {run.pid} on {run.host} is not there; `safelight doctor --fix` clears it up"
        )
    family = [*process.children(recursive=True), process]
    process.terminate()
    _, alive = psutil.wait_procs([process], timeout=STOP_PATIENCE_S)
    for member in family if alive else []:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=STOP_PATIENCE_S)
    row = find_run(bench, run.run_uid)
    if row.status == "running":
        run_rows.close_run(bench.catalog, run.run_uid, "stopped", error="stopped by `safelight stop`")
    return "killed, it did not end by itself" if alive else "stopped"
