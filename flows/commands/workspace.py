"""A workspace and its services: demo, init, import-config, up, down, status, doctor."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.workspace import Workspace
from flows.commands.opening import SCHEMA, AsJson, adopt, open_bench, open_reporter, read_recipe
from flows.commands.records import progress_in_words, run_document
from flows.commands.retraining import retrain_and_show

if TYPE_CHECKING:
    from flows.services import Services


def demo(as_json: AsJson = False) -> None:
    """Teach the embedded base model an app-icon style, end to end, offline; a second time everything is reused."""
    with open_reporter(as_json) as reporter:
        from flows import services
        from flows.demo import RECIPE, write_pictures

        bench = open_bench()
        folder = write_pictures(bench.workspace, reporter.say)
        recipe = read_recipe(RECIPE, data=folder)
        adopt(bench, services.up(bench.workspace, progress=reporter.say))
        retrain_and_show(reporter, recipe)


def init(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the recipe goes.")] = Path(),
    recipe: Annotated[str | None, typer.Option(help="Start from a packaged recipe, such as sdxl or flux1-dev.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create the workspace and write a commented starter recipe, recipe.toml."""
    with open_reporter(as_json) as reporter:
        from flows.starter import write_starter_recipe

        bench = open_bench()
        path = write_starter_recipe(folder, name=recipe, force=force)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "recipe": str(path), "home": str(bench.workspace.home)},
            lambda: reporter.say(f"wrote {path}\nworkspace {bench.workspace.home}\nnext: safelight plan {path}"),
        )


def import_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="kohya's TOML, OneTrainer's JSON, ai-toolkit's YAML.")],
    out: Annotated[Path | None, typer.Option(help="Where the recipe goes; default: beside FILE.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the recipe that another trainer's configuration stands for, and say what became of every key."""
    with open_reporter(as_json) as reporter:
        from components.importers.importing import import_config as read_config
        from flows import importing

        done = read_config(file, out=out, force=force)
        document = {"schema": SCHEMA, "status": "completed"} | importing.document_of(done)
        reporter.finish(document, lambda: importing.show(reporter, document))


def up(
    host: Annotated[
        str, typer.Option(help="Address to listen on; only this machine's own are accepted.")
    ] = "127.0.0.1",
    as_json: AsJson = False,
) -> None:
    """Start Prefect, MLflow, the dashboard and the deployment runner in the background; wait until all are healthy."""
    with open_reporter(as_json) as reporter:
        from flows import services

        bench = open_bench()
        running = services.up(bench.workspace, host=host, progress=reporter.say)
        urls = _addresses(running)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "urls": urls},
            lambda: reporter.table(("service", "address"), [(k, v or "not running") for k, v in urls.items()]),
        )


def down(as_json: AsJson = False) -> None:
    """End what `safelight up` started in this workspace, and nothing else."""
    with open_reporter(as_json) as reporter:
        from flows import services

        ended = services.down(Workspace.from_environment(), progress=reporter.say)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "ended": ended},
            lambda: reporter.say("nothing was running") if not ended else None,
        )


def status(as_json: AsJson = False) -> None:
    """The services, the runs in progress and the schedules."""
    with open_reporter(as_json) as reporter:
        from components.catalog import runs as run_rows
        from flows import deployments, services

        bench = open_bench()
        states = services.status(bench.workspace)
        running = run_rows.running(bench.catalog)
        schedules = deployments.list_schedules(bench.workspace)

        def show() -> None:
            reporter.say(f"workspace {bench.workspace.home}")
            reporter.table(
                ("service", "state", "address", "pid", "detail"),
                [(s.name, s.state, s.url or None, s.pid, s.detail) for s in states],
            )
            for run in running:
                reporter.say(f"running   {run.run_uid}  {run.name}  {progress_in_words(run)}")
            for entry in schedules:
                reporter.say(f"schedule  {entry.name}  {entry.in_words}")

        reporter.finish(
            {
                "schema": SCHEMA,
                "status": "completed",
                "home": str(bench.workspace.home),
                "services": [
                    {"name": s.name, "state": s.state, "url": s.url, "pid": s.pid, "detail": s.detail} for s in states
                ],
                "running": [run_document(run) for run in running],
                "schedules": [{"name": entry.name, "when": entry.in_words} for entry in schedules],
            },
            show,
        )


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended.")] = False, as_json: AsJson = False
) -> None:
    """Look for what a crash, a full disk or a wrong version left behind. Exit code 0: nothing wrong, or all mended."""
    with open_reporter(as_json) as reporter:
        from flows import reconcile, services

        workspace = Workspace.from_environment()
        services.adopt_environment(workspace, services.current(workspace))
        findings = reconcile.examine(workspace, fix=fix, progress=lambda line: reporter.say(line, "dim"))

        def show() -> None:
            for finding in findings:
                reporter.say(f"{'mended' if finding.fixed else 'found'}: {finding.what}", "bold")
                reporter.say(f"  where: {finding.where}\n  {'did' if finding.fixed else 'mend'}: {finding.mend}")
            reporter.say(
                "all is well" if not findings else "" if fix else "`safelight doctor --fix` mends what can be mended"
            )

        healthy = all(finding.fixed for finding in findings)
        reporter.finish(
            {
                "schema": SCHEMA,
                "status": "completed" if healthy else "failed",
                "healthy": healthy,
                "findings": [{"what": f.what, "where": f.where, "mend": f.mend, "fixed": f.fixed} for f in findings],
            },
            show,
        )
        raise typer.Exit(0 if healthy else 1)


def _addresses(running: "Services") -> dict[str, str]:
    return {"dashboard": running.dashboard_url, "mlflow": running.mlflow_url, "prefect": running.prefect_url}
