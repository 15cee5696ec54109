"""`safelight caption`, `edit-caption` and `caption-history`: what captioners and people write, version by version."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.config import CAPTIONER, HUB_MODEL, CaptionsConfig, Recipe
from components.errors import BadInput, StageFailed
from components.stages import Bench
from flows.children import TorchChild
from flows.console import Reporter, seconds

SHOWN = 10  # failures that a person is shown


def caption(
    bench: Bench,
    recipe: Recipe,
    captioners: Sequence[str],
    extent: dict[str, Any],
    on_event: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Let each captioner caption the recipe's pictures, one after the other; returns the command's document.

    Raises BadInput when no captioner is named, StageFailed when one could not caption a single picture.
    """
    from components.captioning.captioner import CAPTIONERS

    if captioners:
        chosen = recipe.captions.model_dump() | {"captioners": tuple(map(_absolute, captioners))}
        recipe = recipe.model_copy(update={"captions": CaptionsConfig.model_validate(chosen)})
    if not recipe.captions.captioners:
        raise BadInput(
            "no captioner is named; pass --captioner NAME=FOLDER or NAME=OWNER/MODEL@COMMIT, or set"
            f" captions.captioners; there are: {', '.join(CAPTIONERS)}"
        )
    threads = int(os.environ.get("SAFELIGHT_THREADS") or len(os.sched_getaffinity(0)))
    reports = []
    with TorchChild(bench.workspace, bench.workspace.logs / "caption.log", threads=threads) as child:
        for captioner in recipe.captions.captioners:
            request = {
                "stage": "caption",
                "data": recipe.data.model_dump(mode="json"),
                "captions": recipe.captions.model_dump(mode="json"),
                "captioner": captioner,
                "dataset": recipe.name,
                "extent": extent,
            }
            report = child.ask(request, on_event).facts
            if report["failed"] and not report["captioned"] + report["known"]:
                first = report["failed"][0]
                raise StageFailed(
                    f"captioner {report['captioner']}: could not caption one of {len(report['failed'])} pictures;"
                    f" {first['file_name']}: {first['error']}"
                )
            reports.append(report)
    policy = recipe.captions.policy
    return {"dataset": recipe.name, "policy": policy, "dry_run": extent["dry_run"], "captioners": reports}


def _absolute(captioner: str) -> str:
    """NAME=SOURCE with a folder by its full path, so that a recipe can name it as well. Raises BadInput."""
    if not CAPTIONER.fullmatch(captioner):
        raise BadInput(f"--captioner {captioner!r}: expected NAME=FOLDER or NAME=OWNER/MODEL@COMMIT")
    name, _, source = captioner.partition("=")
    return captioner if HUB_MODEL.fullmatch(source) else f"{name}={Path(source).expanduser().resolve()}"


def show(reporter: Reporter, document: dict[str, Any]) -> None:
    """What became of the pictures, for a person."""
    for report in document["captioners"]:
        reporter.say(f"{report['captioner']}  {report['source']}", "bold")
        reporter.table(
            ("file", "the captioner said", "the recipe makes of it"),
            [
                (one["file_name"], one["said"] or ", ".join(tag[0] for tag in one["tags"]), one["caption"])
                for one in report["examples"]
            ],
        )
        for failure in report["failed"][:SHOWN]:
            reporter.say(f"failed    {failure['file_name']}: {failure['error']}")
        if len(report["failed"]) > SHOWN:
            reporter.say(f"          and {len(report['failed']) - SHOWN} more; --json has them all", "dim")
        reporter.say(
            f"captioned {report['captioned']} of {report['wanted']}, {report['known']} were known,"
            f" {len(report['failed'])} failed, {seconds(report['seconds'])}"
        )
    if document["dry_run"] is not None:
        reporter.say("a dry run: nothing was kept")
    elif document["policy"] == "none":
        reporter.say('nothing is trained on them yet: set captions.policy to "prose", "tags" or "both" in the recipe')


# by hand ----------------------------------------------------------------------------------------------------------


def edit(bench: Bench, dataset: str, file: str, text: str | None, *, by: str, withdraw: bool) -> dict[str, Any]:
    """Store a person's caption, or take it back; returns the picture's history. Raises BadInput."""
    from components.curation import editing

    if withdraw == (text is not None):
        raise BadInput("give the caption's text, or --withdraw to let the source's count again")
    if text is None:
        editing.withdraw_caption(bench.catalog, dataset, file, by=by)
    else:
        editing.edit_caption(bench.catalog, dataset, file, text, by=by)
    return history(bench, dataset, file)


def history(bench: Bench, dataset: str, file: str) -> dict[str, Any]:
    """Every stored version of a picture's caption, the newest first. Raises BadInput."""
    from components.curation import editing

    found = editing.caption_history(bench.catalog, dataset, file)
    return {
        "dataset": dataset,
        "file_name": file,
        "caption": found.item.caption,
        "versions": [
            {
                "author": one.author,
                "kind": one.kind,
                "source": one.source,
                "revision": one.revision,
                "prompt": one.prompt,
                "version": one.version,
                "text": one.text,
                "tags": [list(tag) for tag in one.tags],
                "created_at": one.created_at,
            }
            for one in found.versions
        ],
    }


def show_history(reporter: Reporter, document: dict[str, Any]) -> None:
    """The versions of a picture's caption, for a person."""
    reporter.say(f"{document['dataset']}  {document['file_name']}", "bold")
    reporter.say(f"in the newest version of the dataset: {document['caption'] or 'no caption'}")
    reporter.table(
        ("when", "by", "version", "caption"),
        [
            (
                f"{one['created_at']:%Y-%m-%d %H:%M}",
                f"{one['author']}@{one['revision'][:12]}" if one["revision"] else one["author"],
                one["version"],
                one["text"] or ", ".join(tag[0] for tag in one["tags"]) or "withdrawn: the source's counts again",
            )
            for one in document["versions"]
        ],
    )
