"""What is done with a recipe: plan, the stages, promotion and schedules."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.errors import BadInput, StageFailed
from flows.commands.opening import (
    SCHEMA,
    TERMINATED,
    AsJson,
    DataFolder,
    Overrides,
    RecipePath,
    open_bench,
    open_reporter,
    read_recipe,
    require_inputs,
    serve,
    told,
    user,
)

if TYPE_CHECKING:
    from components.config import Recipe
    from flows.console import Reporter
    from flows.retrain import UpTo

EXIT_CODES = {"stopped": TERMINATED, "completed": 0}
Verify = Annotated[
    bool, typer.Option("--verify", help="Hash every file and object, also what is known to be unchanged.")
]


def plan(recipe: RecipePath, data: DataFolder = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a retraining would do, without doing it: pictures, steps, what is reused, expected time and memory."""
    with open_reporter(as_json) as reporter:
        from flows import plans

        bench = open_bench()
        document = plans.plan(bench, read_recipe(recipe, overrides, data), reporter.event)
        reporter.finish({"schema": SCHEMA, "status": "completed"} | document, lambda: plans.show(reporter, document))


def curate(recipe: RecipePath, data: DataFolder = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check the pictures, drop duplicates, split, and commit a snapshot."""
    _run_recipe("curate", recipe, data, overrides, as_json)


def cache(
    recipe: RecipePath,
    data: DataFolder = None,
    overrides: Overrides = None,
    verify: Verify = False,
    as_json: AsJson = False,
) -> None:
    """Curate, then encode latents and prompts."""
    _run_recipe("cache", recipe, data, overrides, as_json, verify=verify)


def retrain(
    recipe: RecipePath,
    data: DataFolder = None,
    overrides: Overrides = None,
    verify: Verify = False,
    as_json: AsJson = False,
) -> None:
    """Curate, cache, fine-tune, evaluate and register; whatever is unchanged is reused."""
    _run_recipe("register", recipe, data, overrides, as_json, verify=verify)


def evaluate(
    recipe: RecipePath,
    data: DataFolder = None,
    overrides: Overrides = None,
    adapter: Annotated[Path | None, typer.Option(help="Evaluate this adapter file instead of training one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Everything up to the evaluation; nothing is registered."""
    _run_recipe("evaluate", recipe, data, overrides, as_json, adapter)


def promote(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A registered model: NAME, NAME@ALIAS or NAME/VERSION.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")] = "",
    by: Annotated[str | None, typer.Option(help="Who decides; default: the user's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also when the gate rejects the version.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion (default: the challenger); the champion before it becomes `previous`."""
    with open_reporter(as_json) as reporter:
        bench = open_bench()
        serve(bench, reporter)
        from flows import promote as promotion
        from flows.tracking import registry

        name, version = _split_model(name, lambda model: registry.aliases(bench.workspace, model))
        outcome = promotion.promote_version(name, version, by=by or user(), reason=reason, force=force)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | outcome,
            lambda: reporter.say(
                f"{outcome['name']} version {outcome['version']} is the champion; gate: {outcome['decision']};"
                f" previous: {outcome['previous'] or 'none'}"
            ),
        )


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
    with open_reporter(as_json) as reporter:
        from flows import deployments, services

        bench = open_bench()
        document: dict[str, Any] = {"schema": SCHEMA, "status": "completed"}
        if remove:
            deployments.remove_schedule(bench.workspace, remove)
            document["removed"] = remove
        elif recipe is not None:
            entry = deployments.store_schedule(
                bench.workspace,
                read_recipe(recipe, overrides, data),
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


def _run_recipe(
    upto: "UpTo",
    path: Path,
    data: Path | None,
    overrides: Sequence[str] | None,
    as_json: bool,
    adapter: Path | None = None,
    *,
    verify: bool = False,
) -> None:
    with open_reporter(as_json) as reporter:
        recipe = read_recipe(path, overrides, data)
        if adapter is not None:
            from components.config import looking_at

            recipe = looking_at(recipe, adapter)
        require_inputs(recipe)
        serve(open_bench(), reporter)
        retrain_and_show(reporter, recipe, upto=upto, verify=verify)


def retrain_and_show(
    reporter: "Reporter", recipe: "Recipe", upto: "UpTo" = "register", *, verify: bool = False
) -> None:
    from flows.console import show_card
    from flows.retrain import retrain_recipe

    def relay(event: dict[str, Any]) -> None:
        if event["event"] == "run":
            told["run_uid"] = event["run_uid"]
        reporter.event(event)

    card = retrain_recipe(recipe, upto=upto, verify=verify, on_event=relay)
    reporter.finish(card, lambda: show_card(reporter, card))
    raise typer.Exit(EXIT_CODES.get(card["status"], StageFailed.exit_code))


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
