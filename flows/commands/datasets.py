"""Snapshots and the store they lie in: diff, export-dataset, gc."""

from pathlib import Path
from typing import Annotated

import typer

from components.errors import BadInput
from flows.commands.opening import SCHEMA, AsJson, open_bench, open_reporter


def diff(
    before: Annotated[str, typer.Argument(metavar="DATASET@VERSION", help="Such as cats@7; cats alone: its newest.")],
    after: Annotated[str, typer.Argument(metavar="DATASET@VERSION", help="What to compare it with.")],
    as_json: AsJson = False,
) -> None:
    """What changed between two versions: added, removed, recaptioned, judged otherwise, moved between the splits."""
    with open_reporter(as_json) as reporter:
        from flows import datasets

        document = datasets.diff(open_bench(), before, after)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: datasets.show_diff(reporter, document)
        )


def export_dataset(
    what: Annotated[str, typer.Argument(metavar="DATASET@VERSION", help="Such as cats@8; cats alone: its newest.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or not there yet.")],
    as_json: AsJson = False,
) -> None:
    """Write a version as Parquet with a dataset card, a folder that datasets.load_dataset opens."""
    with open_reporter(as_json) as reporter:
        from flows import datasets

        document = datasets.export(open_bench(), what, out, reporter.event)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: datasets.show_export(reporter, document)
        )


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count; what happens without --yes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what nothing needs and nobody has wanted lately.")] = False,
    older_than: Annotated[str, typer.Option(help="How long ago that has to be: 12h, 30d.")] = "30d",
    as_json: AsJson = False,
) -> None:
    """Count what the object store holds, and delete what no result, snapshot, model, gallery or run needs."""
    with open_reporter(as_json) as reporter:
        from flows import gc as collection

        if dry_run and yes:
            raise BadInput("--dry-run counts and --yes deletes; give one of them")
        document = collection.collect(open_bench(), older_than, delete=yes)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: collection.show(reporter, document)
        )
