"""What commands begin with: the options that they share, the workspace, the recipe and the servers."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.errors import BadInput
from components.workspace import Workspace

if TYPE_CHECKING:
    from components.config import Recipe
    from components.stages import Bench
    from flows.console import Reporter
    from flows.services import Services

SCHEMA = 1
TERMINATED = 143
PREFECT_CONSOLE = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
PREFECT_INTERNAL = "PREFECT_INTERNAL_LOGGING_LEVEL"
told: dict[str, str] = {}  # what the document of a failed command says beside its error: the run's uid

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


def open_reporter(as_json: bool) -> "Reporter":
    from flows.console import Reporter

    return Reporter(as_json)


def open_bench() -> "Bench":
    """The workspace with its catalog at the newest revision, both created when they are not there."""
    from components.stages import Bench

    bench = Bench.open(Workspace.from_environment())
    bench.catalog.migrate()
    return bench


def serve(bench: "Bench", reporter: "Reporter") -> None:
    """Start what runs need and adopt its addresses."""
    from flows import services

    adopt(bench, services.ensure_up(bench.workspace, ("prefect", "mlflow"), reporter.say))


def adopt(bench: "Bench", running: "Services") -> None:
    """Put the services' addresses into the environment, before Prefect or MLflow are imported."""
    from flows import services

    services.adopt_environment(bench.workspace, running)
    os.environ.setdefault(PREFECT_CONSOLE, "CRITICAL")  # what Prefect logs is on its page; here a command speaks
    os.environ.setdefault(PREFECT_INTERNAL, "CRITICAL")
    logging.raiseExceptions = False  # a log that Prefect does not take is no news for the reader of this command


def read_recipe(path: Path, overrides: Sequence[str] | None = None, data: Path | None = None) -> "Recipe":
    from components.config import load_recipe

    if data is not None and not data.exists():
        raise BadInput(f"--data {data}: no such folder")
    return load_recipe(path, overrides=overrides or (), data=data)


def require_inputs(recipe: "Recipe") -> None:
    """Raises BadInput for folders and a base that are not there, before servers are started, which takes a minute."""
    from components.curation.sources import require_pictures
    from components.families.bases import find_base

    require_pictures(recipe.data)
    find_base(recipe.base)
    if recipe.training.init_adapter is not None:
        from components.layouts.files import read_metadata

        read_metadata(Path(recipe.training.init_adapter))


def user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "someone"
