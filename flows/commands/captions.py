"""Captions by models and by hand: caption, edit-caption, caption-history."""

from typing import Annotated

import typer

from flows.commands.opening import (
    SCHEMA,
    AsJson,
    DataFolder,
    Overrides,
    RecipePath,
    open_bench,
    open_reporter,
    read_recipe,
    user,
)


def caption(
    recipe: RecipePath,
    *,
    captioner: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="blip, florence2, wd or vlm, and its FOLDER or OWNER/MODEL@COMMIT; default: captions.captioners."
            " May be repeated.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also pictures that have a caption.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also what the captioner has captioned before, as another version.")
    ] = False,
    dry_run: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Caption N pictures, show that and keep nothing.")
    ] = None,
    data: DataFolder = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Let a model caption the pictures that nobody has captioned; the captions go into the catalog as versions."""
    with open_reporter(as_json) as reporter:
        from flows import captioning

        settings = read_recipe(recipe, overrides, data)
        extent = {"everything": everything, "overwrite": overwrite, "dry_run": dry_run}
        document = captioning.caption(open_bench(), settings, captioner or (), extent, reporter.event)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: captioning.show(reporter, document)
        )


def edit_caption(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A dataset's name; the edit holds in it alone.")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="A picture's name in the dataset's newest version.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Its caption from now on.")] = None,
    *,
    by: Annotated[str | None, typer.Option(help="Who writes it; default: the user's name.")] = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Let the source's caption count again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a picture's caption by hand: it counts before the source's and a model's, which stay as they are."""
    with open_reporter(as_json) as reporter:
        from flows import captioning

        document = captioning.edit(open_bench(), dataset, file, text, by=by or user(), withdraw=withdraw)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: captioning.show_history(reporter, document)
        )


def caption_history(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A dataset's name.")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="A picture's name in the dataset's newest version.")],
    as_json: AsJson = False,
) -> None:
    """Every stored version of a picture's caption: who wrote it, when, and what it said."""
    with open_reporter(as_json) as reporter:
        from flows import captioning

        document = captioning.history(open_bench(), dataset, file)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document, lambda: captioning.show_history(reporter, document)
        )
