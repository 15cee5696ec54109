"""The `safelight` command. Each command reads its flags, calls one function and shows what came back.

Nothing heavy is imported at the top: `safelight --help` needs neither Prefect, MLflow nor torch.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from components.errors import BadInput, SafelightError, StageFailed, Stopped
from components.workspace import Workspace

if TYPE_CHECKING:
    from components.catalog.models import Run
    from components.config import Recipe
    from components.stages import Bench
    from flows.console import Reporter
    from flows.retrain import UpTo
    from flows.services import Services

SCHEMA = 1
INTERRUPTED, TERMINATED = 130, 143
PREFECT_CONSOLE = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
PREFECT_INTERNAL = "PREFECT_INTERNAL_LOGGING_LEVEL"
STOP_PATIENCE_S = 60.0
EXIT_PATIENCE_S = 15.0  # for logs and events on their way to Prefect
EXIT_CODES = {"stopped": TERMINATED, "completed": 0}
_facts: dict[str, str] = {}  # what the document of a failed command says beside its error: the run's uid

app = typer.Typer(
    name="safelight",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a folder of captioned pictures to a fine-tuned, evaluated,"
    " reviewed and registered image model, again and again, on a schedule.",
)


studies = typer.Typer(no_args_is_help=True, help="Measure choices on your own data and bases.")
app.add_typer(studies, name="study")


class Layout(StrEnum):
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    COMFYUI = "comfyui"


AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; everything else on stderr.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, TOML.")]
DataFolder = Annotated[
    Path | None, typer.Option("--data", metavar="FOLDER", help="Read this folder, not the recipe's sources.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one recipe key, for example training.rank=32. May be repeated."
    ),
]


# a workspace and its services -------------------------------------------------------------------------------------


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Teach the embedded base model an app-icon style, end to end, offline; a second time everything is reused."""
    with _reporter(as_json) as reporter:
        from flows import services
        from flows.demo import RECIPE, write_pictures

        bench = _open_bench()
        folder = write_pictures(bench.workspace, reporter.say)
        recipe = _read_recipe(RECIPE, data=folder)
        _adopt(bench, services.up(bench.workspace, progress=reporter.say))
        _retrain(reporter, recipe)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the recipe goes.")] = Path(),
    recipe: Annotated[str | None, typer.Option(help="Start from a packaged recipe, such as sdxl or flux1-dev.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create the workspace and write a commented starter recipe, recipe.toml."""
    with _reporter(as_json) as reporter:
        from flows.starter import write_starter_recipe

        bench = _open_bench()
        path = write_starter_recipe(folder, name=recipe, force=force)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "recipe": str(path), "home": str(bench.workspace.home)},
            lambda: reporter.say(f"wrote {path}\nworkspace {bench.workspace.home}\nnext: safelight plan {path}"),
        )


@app.command("import-config")
def import_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="kohya's TOML, OneTrainer's JSON, ai-toolkit's YAML.")],
    out: Annotated[Path | None, typer.Option(help="Where the recipe goes; default: beside FILE.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the recipe that another trainer's configuration stands for, and say what became of every key."""
    with _reporter(as_json) as reporter:
        from components.importers.importing import import_config as read_config
        from flows import importing

        done = read_config(file, out=out, force=force)
        document = {"schema": SCHEMA, "status": "completed"} | importing.document_of(done)
        reporter.finish(document, lambda: importing.show(reporter, document))


@app.command()
def up(
    host: Annotated[
        str, typer.Option(help="Address to listen on; only this machine's own are accepted.")
    ] = "127.0.0.1",
    as_json: AsJson = False,
) -> None:
    """Start Prefect, MLflow, the dashboard and the deployment runner in the background; wait until all are healthy."""
    with _reporter(as_json) as reporter:
        from flows import services

        bench = _open_bench()
        running = services.up(bench.workspace, host=host, progress=reporter.say)
        urls = _addresses(running)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "urls": urls},
            lambda: reporter.table(("service", "address"), [(k, v or "not running") for k, v in urls.items()]),
        )


@app.command()
def down(as_json: AsJson = False) -> None:
    """End what `safelight up` started in this workspace, and nothing else."""
    with _reporter(as_json) as reporter:
        from flows import services

        ended = services.down(Workspace.from_environment(), progress=reporter.say)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "ended": ended},
            lambda: reporter.say("nothing was running") if not ended else None,
        )


@app.command()
def status(as_json: AsJson = False) -> None:
    """The services, the runs in progress and the schedules."""
    with _reporter(as_json) as reporter:
        from components.catalog import runs as run_rows
        from flows import deployments, services

        bench = _open_bench()
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
                reporter.say(f"running   {run.run_uid}  {run.name}  {_progress_in_words(run)}")
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
                "running": [_run_document(run) for run in running],
                "schedules": [{"name": entry.name, "when": entry.in_words} for entry in schedules],
            },
            show,
        )


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended.")] = False, as_json: AsJson = False
) -> None:
    """Look for what a crash, a full disk or a wrong version left behind. Exit code 0: nothing wrong, or all mended."""
    with _reporter(as_json) as reporter:
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


# from pictures to a model -----------------------------------------------------------------------------------------


@app.command()
def plan(recipe: RecipePath, data: DataFolder = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a retraining would do, without doing it: pictures, steps, what is reused, expected time and memory."""
    with _reporter(as_json) as reporter:
        from flows import plans

        bench = _open_bench()
        document = plans.plan(bench, _read_recipe(recipe, overrides, data))
        reporter.finish({"schema": SCHEMA, "status": "completed"} | document, lambda: plans.show(reporter, document))


@app.command()
def curate(recipe: RecipePath, data: DataFolder = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check the pictures, drop duplicates, split, and commit a snapshot."""
    _run_recipe("curate", recipe, data, overrides, as_json)


@app.command()
def cache(recipe: RecipePath, data: DataFolder = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Curate, then encode latents and prompts."""
    _run_recipe("cache", recipe, data, overrides, as_json)


@app.command()
def retrain(recipe: RecipePath, data: DataFolder = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Curate, cache, fine-tune, evaluate and register; whatever is unchanged is reused."""
    _run_recipe("register", recipe, data, overrides, as_json)


@app.command()
def evaluate(
    recipe: RecipePath,
    data: DataFolder = None,
    overrides: Overrides = None,
    adapter: Annotated[Path | None, typer.Option(help="Evaluate this adapter file instead of training one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Everything up to the evaluation; nothing is registered."""
    _run_recipe("evaluate", recipe, data, overrides, as_json, adapter)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A registered model: NAME, NAME@ALIAS or NAME/VERSION.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")] = "",
    by: Annotated[str | None, typer.Option(help="Who decides; default: the user's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also when the gate rejects the version.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion (default: the challenger); the champion before it becomes `previous`."""
    with _reporter(as_json) as reporter:
        bench = _open_bench()
        _serve(bench, reporter)
        from flows import promote as promotion
        from flows.tracking import registry

        name, version = _split_model(name, lambda model: registry.aliases(bench.workspace, model))
        outcome = promotion.promote_version(name, version, by=by or _user(), reason=reason, force=force)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | outcome,
            lambda: reporter.say(
                f"{outcome['name']} version {outcome['version']} is the champion; gate: {outcome['decision']};"
                f" previous: {outcome['previous'] or 'none'}"
            ),
        )


@app.command()
def schedule(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe, TOML.")] = None,
    *,
    cron: Annotated[str | None, typer.Option(help='A cron line, for example "0 3 * * *".')] = None,
    every: Annotated[str | None, typer.Option(help="A span: 30m, 6h, 1d.")] = None,
    when_new: Annotated[int | None, typer.Option(help="Run when this many pictures are new or changed.")] = None,
    data: DataFolder = None,
    overrides: Overrides = None,
    listing: Annotated[bool, typer.Option("--list", help="Show the schedules.")] = False,
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Forget a schedule.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe by itself, while `safelight up` is on: by the clock, or when enough pictures are new."""
    with _reporter(as_json) as reporter:
        from flows import deployments, services

        bench = _open_bench()
        document: dict[str, Any] = {"schema": SCHEMA, "status": "completed"}
        if remove:
            deployments.remove_schedule(bench.workspace, remove)
            document["removed"] = remove
        elif recipe is not None:
            entry = deployments.store_schedule(
                bench.workspace,
                _read_recipe(recipe, overrides, data),
                recipe,
                cron=cron,
                every=every,
                when_new=when_new,
            )
            document["stored"] = entry.name
        elif not listing:
            raise BadInput("nothing to schedule; name a recipe, or pass --list or --remove NAME")
        entries = deployments.list_schedules(bench.workspace)
        document["schedules"] = [{"name": e.name, "when": e.in_words, "recipe": e.recipe_path} for e in entries]
        document["runner"] = {s.name: s.state for s in services.status(bench.workspace)}["runner"]

        def show() -> None:
            reporter.table(("schedule", "when", "recipe"), [(e.name, e.in_words, e.recipe_path) for e in entries])
            if entries and document["runner"] != "up":
                reporter.say("the deployment runner is down, nothing runs by itself; `safelight up` starts it")

        reporter.finish(document, show)


# looking at what ran ----------------------------------------------------------------------------------------------


@app.command()
def runs(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20, as_json: AsJson = False
) -> None:
    """The newest runs."""
    with _reporter(as_json) as reporter:
        bench = _open_bench()
        rows = _newest_runs(bench, limit)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "runs": [_run_document(run) for run in rows]},
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
                        _progress_in_words(run) or run.error,
                    )
                    for run in rows
                ],
            ),
        )


@app.command()
def show(
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|FILE|MODEL", help="The start of a run's uid, an adapter file, or a model's name."),
    ],
    as_json: AsJson = False,
) -> None:
    """Everything known about a run, an adapter file or a registered model."""
    with _reporter(as_json) as reporter:
        from flows import showing

        if what.endswith(".safetensors") or Path(what).is_file():
            showing.show_file(reporter, Path(what))
            return
        bench = _open_bench()
        run = _find_run(bench, what, required=False)
        if run is not None:
            showing.show_run(reporter, bench, run)
        else:
            showing.show_model(reporter, bench, what)


@app.command()
def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The start of a run's uid.")],
    lines: Annotated[int, typer.Option(min=1, help="How many lines at most, the last ones.")] = 200,
    as_json: AsJson = False,
) -> None:
    """What a run said."""
    with _reporter(as_json) as reporter:
        from flows import showing

        bench = _open_bench()
        row = _find_run(bench, run)
        told = showing.log_lines(bench, row.run_uid)[-lines:]
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "run_uid": row.run_uid, "lines": told},
            lambda: reporter.say("\n".join(told) or "nothing was written down"),
        )


@app.command()
def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The start of a run's uid.")], as_json: AsJson = False
) -> None:
    """Ask a run to save what it has and end; wait until it has."""
    with _reporter(as_json) as reporter:
        bench = _open_bench()
        row = _find_run(bench, run)
        told = _stop_run(bench, row)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "run_uid": row.run_uid, "outcome": told},
            lambda: reporter.say(f"{row.run_uid}: {told}"),
        )


# versions of a dataset, and the store ------------------------------------------------------------------------------


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="DATASET@VERSION", help="Such as cats@7; cats alone: its newest.")],
    after: Annotated[str, typer.Argument(metavar="DATASET@VERSION", help="What to compare it with.")],
    as_json: AsJson = False,
) -> None:
    """What changed between two versions: added, removed, recaptioned, judged otherwise, moved between the splits."""
    with _reporter(as_json) as reporter:
        from flows import datasets

        document = datasets.diff(_open_bench(), before, after)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: datasets.show_diff(reporter, document)
        )


@app.command()
def export_dataset(
    what: Annotated[str, typer.Argument(metavar="DATASET@VERSION", help="Such as cats@8; cats alone: its newest.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or not there yet.")],
    as_json: AsJson = False,
) -> None:
    """Write a version as Parquet with a dataset card, a folder that datasets.load_dataset opens."""
    with _reporter(as_json) as reporter:
        from flows import datasets

        document = datasets.export(_open_bench(), what, out, reporter.event)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: datasets.show_export(reporter, document)
        )


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count; what happens without --yes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what nothing needs and nobody has wanted lately.")] = False,
    older_than: Annotated[str, typer.Option(help="How long ago that has to be: 12h, 30d.")] = "30d",
    as_json: AsJson = False,
) -> None:
    """Count what the object store holds, and delete what no result, snapshot, model, gallery or run needs."""
    with _reporter(as_json) as reporter:
        from flows import gc as collection

        if dry_run and yes:
            raise BadInput("--dry-run counts and --yes deletes; give one of them")
        document = collection.collect(_open_bench(), older_than, delete=yes)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: collection.show(reporter, document)
        )


# using a model ----------------------------------------------------------------------------------------------------


@app.command()
def generate(
    *,
    prompt: Annotated[list[str], typer.Option(help="What to draw. May be repeated.")],
    model: Annotated[str | None, typer.Option(help="A registered model: NAME, NAME@ALIAS or NAME/VERSION.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter file instead.")] = None,
    base: Annotated[str, typer.Option(help="The base model, for --adapter and for none of both.")] = "embedded",
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures for each prompt, with consecutive seeds.")] = 1,
    num_inference_steps: Annotated[int | None, typer.Option("--steps", min=1, help="Sampler steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance", min=1, help="Classifier-free guidance.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("generated"),
    as_json: AsJson = False,
) -> None:
    """Draw pictures with a registered model, an adapter file or the base alone."""
    with _reporter(as_json) as reporter:
        from flows import drawing

        bench = _open_bench()
        wanted = drawing.Wanted(tuple(prompt), seed, count, num_inference_steps, guidance_scale)
        files = drawing.draw(bench, wanted, model=model, adapter=adapter, base=base, out=out, on_event=reporter.event)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "files": [str(file) for file in files]},
            lambda: reporter.say("\n".join(map(str, files))),
        )


@app.command()
def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE|FOLDER",
            help="NAME, NAME@ALIAS or NAME/VERSION; an adapter file; or a fine-tuned pipeline to extract a LoRA from.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    layout: Annotated[
        list[Layout] | None, typer.Option(help="May be repeated; default: diffusers and kohya, where they exist.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of a file or folder; default: the embedded base.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the LoRA at most; the best of that rank.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the base with the adapter in its weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as files that other programs load, in another rank, or merged into its base."""
    with _reporter(as_json) as reporter:
        from flows import exporting

        layouts = [chosen.value for chosen in layout] if layout else None
        document = exporting.export(_open_bench(), what, out, layouts, base=base, rank=rank, merge=merge)
        lines = [*document["files"].values(), *document["skipped"].values()]
        lines += [document["card"]] if "card" in document else []
        if document.get("frobenius_error", 0.0) >= 0.00005:  # less would read as 0.00 %
            lines.append(f"lost by the lower rank: {document['frobenius_error']:.2%} of the update's Frobenius norm")
        reporter.finish({"schema": SCHEMA, "status": "completed"} | document, lambda: reporter.say("\n".join(lines)))


@app.command()
def pretrain(
    *,
    node_modules: Annotated[Path, typer.Option(help="Where npm installed the packages of emoji drawings.")],
    out: Annotated[Path | None, typer.Option(help="Checkpoints and results; default: in the workspace.")] = None,
    start: Annotated[Path | None, typer.Option(help="Go on from this pipeline's weights.")] = None,
    autoencoder: Annotated[Path | None, typer.Option(help="Take this pipeline's instead of training one.")] = None,
    objective: Annotated[str | None, typer.Option(help="ddpm, v, edm or flow; default: as the settings say.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with the fields of PretrainConfig to change.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of torch, on the CPU.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train a small base model from scratch on emoji drawings; the same command goes on where it was stopped."""
    with _reporter(as_json) as reporter:
        from components.training.pretraining_config import read_config

        for name, folder in (("--node-modules", node_modules), ("--start", start), ("--autoencoder", autoencoder)):
            if folder is not None and not folder.is_dir():
                raise BadInput(f"{name} {folder}: no such folder; components/base/README.md says what belongs there")
        settings = read_config(config, **({"objective": objective} if objective else {}))
        if start is not None:
            from components.training.formulations import require_objective

            require_objective(start, settings)
        bench = _open_bench()
        _serve(bench, reporter)
        from flows.pretrain import pretrain as pretrain_flow

        target = (out or bench.workspace.home / "pretrain").resolve()
        target.mkdir(parents=True, exist_ok=True)
        document = pretrain_flow(
            node_modules.resolve(),
            target,
            start and start.resolve(),
            autoencoder and autoencoder.resolve(),
            device=device,
            threads=threads,
            config=settings,
        )
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document,
            lambda: reporter.say(f"{document['pipeline']}\n{json.dumps(document['figures'], indent=2)}"),
        )


@studies.command()
def samplers(
    recipe: RecipePath,
    *,
    data: DataFolder = None,
    overrides: Overrides = None,
    base: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Compare these bases; default: the recipe's.")
    ] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="Only these; default: all that suit a base.")] = None,
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "2,5,10,20,50",
    guidance: Annotated[str, typer.Option(help="Guidance scales, drawn with the base's own sampler.")] = "1,2,4,8",
    out: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("samplers.png"),
    as_json: AsJson = False,
) -> None:
    """KID and prompt match of every sampler at every number of steps, and what guidance buys, as one figure."""
    with _reporter(as_json) as reporter:
        from components.config import BaseModelConfig
        from components.storage import atomic_write

        settings = _read_recipe(recipe, overrides, data)
        bases = {name: BaseModelConfig.model_validate({"model": model}) for name, model in map(_named, base or ())}
        plan = {"steps": _numbers("--steps", steps, int), "guidance": _numbers("--guidance", guidance, float)}
        plan |= {"samplers": sampler} if sampler else {}
        _require_inputs(settings)
        _serve(_open_bench(), reporter)
        from flows import study

        document = study.study_recipe(settings, bases or {"base": settings.base}, plan, reporter.event)
        with atomic_write(out) as file:
            file.write(Path(document["figure"]).read_bytes())
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document | {"figure": str(out)},
            lambda: study.show(reporter, document, out),
        )


def _named(option: str) -> tuple[str, str]:
    name, found, model = option.partition("=")
    if not (found and name and model):
        raise BadInput(f"--base {option!r}: expected NAME=MODEL, for example flow=out/pipeline")
    return name, model


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise BadInput(f"{option} {text!r}: expected numbers of at least 1 with commas between, for example 5,10,20")
    return numbers


# what the commands share ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs a command and turns whatever it raises into one line and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _on_sigterm)
    code = _run(arguments)
    _leave_in_time(code)
    sys.exit(code)


def _leave_in_time(code: int) -> None:
    """End with `code` soon, also where Prefect's client still tries to tell a dead server what happened."""
    sys.stdout.flush()
    overdue = threading.Timer(EXIT_PATIENCE_S, os._exit, [code])
    overdue.daemon = True
    overdue.start()


def _run(arguments: list[str]) -> int:  # noqa: PLR0911
    _facts.clear()
    try:
        code = app(arguments, prog_name="safelight", standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TyperException as error:
        return _fail(arguments, error.format_message(), error.exit_code)
    except SafelightError as error:
        return _fail(arguments, str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            arguments, "stopped by Ctrl-C; the same command goes on from the last commit", INTERRUPTED, "stopped"
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has left
        return 1
    except Exception as error:
        from components.storage import lack_of_room

        if full := lack_of_room(error, Workspace.from_environment().home):
            return _fail(arguments, str(full), full.exit_code)
        return _fail(arguments, f"{type(error).__name__}: {error} (details: {_keep_traceback()})", 1)
    except BaseException as error:
        if type(error).__name__ != "TerminationSignal":  # Prefect's name for SIGTERM
            raise
        return _fail(arguments, "stopped by a signal", TERMINATED, "stopped")


def _fail(arguments: list[str], message: str, code: int, outcome: str = "failed") -> int:
    line = " ".join(message.split())
    if code in (INTERRUPTED, TERMINATED):
        outcome = "stopped"
    if "--json" in arguments:
        from flows.console import write_document

        write_document({"schema": SCHEMA, "status": outcome, "error": line} | _facts)
    print(f"error: {line}", file=sys.stderr)
    return code


def _keep_traceback() -> str:
    """Where the traceback was written to; why it was not, when even that cannot be."""
    path = Workspace.from_environment().logs / "safelight.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {' '.join(sys.argv)}\n{traceback.format_exc()}\n")
    except OSError as error:
        return f"not kept, {error}"
    return str(path)


def _on_sigterm(*_: object) -> None:
    raise Stopped("stopped by SIGTERM; the same command goes on from the last commit")


def _reporter(as_json: bool) -> "Reporter":
    from flows.console import Reporter

    return Reporter(as_json)


def _open_bench() -> "Bench":
    """The workspace with its catalog at the newest revision, both created when they are not there."""
    from components.stages import Bench

    bench = Bench.open(Workspace.from_environment())
    bench.catalog.migrate()
    return bench


def _serve(bench: "Bench", reporter: "Reporter") -> None:
    """Start what runs need and adopt its addresses."""
    from flows import services

    _adopt(bench, services.ensure_up(bench.workspace, ("prefect", "mlflow"), reporter.say))


def _adopt(bench: "Bench", running: "Services") -> None:
    """Put the services' addresses into the environment, before Prefect or MLflow are imported."""
    from flows import services

    services.adopt_environment(bench.workspace, running)
    os.environ.setdefault(PREFECT_CONSOLE, "CRITICAL")  # what Prefect logs is on its page; here a command speaks
    os.environ.setdefault(PREFECT_INTERNAL, "CRITICAL")
    logging.raiseExceptions = False  # a log that Prefect does not take is no news for the reader of this command


def _read_recipe(path: Path, overrides: Sequence[str] | None = None, data: Path | None = None) -> "Recipe":
    from components.config import load_recipe

    if data is not None and not data.exists():
        raise BadInput(f"--data {data}: no such folder")
    return load_recipe(path, overrides=overrides or (), data=data)


def _require_inputs(recipe: "Recipe") -> None:
    """Raises BadInput for folders and a base that are not there, before servers are started, which takes a minute."""
    from components.curation.sources import require_pictures
    from components.families.bases import find_base

    require_pictures(recipe.data)
    find_base(recipe.base)
    if recipe.training.init_adapter is not None:
        from components.layouts.files import read_metadata

        read_metadata(Path(recipe.training.init_adapter))


def _run_recipe(
    upto: "UpTo",
    path: Path,
    data: Path | None,
    overrides: Sequence[str] | None,
    as_json: bool,
    adapter: Path | None = None,
) -> None:
    with _reporter(as_json) as reporter:
        recipe = _read_recipe(path, overrides, data)
        if adapter is not None:
            from components.config import looking_at

            recipe = looking_at(recipe, adapter)
        _require_inputs(recipe)
        _serve(_open_bench(), reporter)
        _retrain(reporter, recipe, upto=upto)


def _retrain(reporter: "Reporter", recipe: "Recipe", upto: "UpTo" = "register") -> None:
    from flows.console import show_card
    from flows.retrain import retrain_recipe

    def relay(event: dict[str, Any]) -> None:
        if event["event"] == "run":
            _facts["run_uid"] = event["run_uid"]
        reporter.event(event)

    card = retrain_recipe(recipe, upto=upto, on_event=relay)
    reporter.finish(card, lambda: show_card(reporter, card))
    raise typer.Exit(EXIT_CODES.get(card["status"], StageFailed.exit_code))


def _addresses(running: "Services") -> dict[str, str]:
    return {"dashboard": running.dashboard_url, "mlflow": running.mlflow_url, "prefect": running.prefect_url}


def _newest_runs(bench: "Bench", limit: int) -> list["Run"]:
    from sqlalchemy import select

    from components.catalog.models import Run

    with bench.catalog.read() as session:
        return list(session.scalars(select(Run).order_by(Run.run_uid.desc()).limit(limit)))


def _find_run(bench: "Bench", start: str, *, required: bool = True) -> Any:
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


def _run_document(run: "Run") -> dict[str, Any]:
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


def _progress_in_words(run: "Run") -> str:
    if run.status != "running" or not run.progress:
        return ""
    return f"{run.progress.get('stage', '')} {run.progress.get('done', '')}/{run.progress.get('total', '')}"


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
    row = _find_run(bench, run.run_uid)
    if row.status == "running":
        run_rows.close_run(bench.catalog, run.run_uid, "stopped", error="stopped by `safelight stop`")
    return "killed, it did not end by itself" if alive else "stopped"


def _split_model(name: str, aliases: Callable[[str], Mapping[str, int]]) -> tuple[str, int | None]:
    """NAME, NAME@ALIAS or NAME/VERSION as (name, version); None: the one that the command takes by default."""
    model, at, alias = name.partition("@")
    if at:
        version = aliases(model).get(alias)
        if version is None:
            raise BadInput(f"{model} has no alias {alias!r}; there are: {', '.join(aliases(model)) or 'none'}")
        return model, version
    model, slash, number = name.partition("/")
    if slash and not number.isdigit():
        raise BadInput(f"{name!r}: expected NAME, NAME@ALIAS or NAME/VERSION")
    return model, int(number) if slash else None


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "someone"


if __name__ == "__main__":
    main()
