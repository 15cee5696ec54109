"""`safelight diff` and `export-dataset`: what people do with the versions of a dataset."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.catalog import differences
from components.catalog.datasets import ItemRow, SnapshotRow, VerdictRow
from components.catalog.differences import KINDS, Change, told
from components.stages import Bench
from flows.console import Reporter, size

FIRST = 10  # changes of a kind that a person is shown
WIDTH = 60  # characters of a caption that a person is shown


def diff(bench: Bench, before: str, after: str) -> dict[str, Any]:
    """The document of `safelight diff`: counts and every change by kind. Raises BadInput for what is not there."""
    old, new = (differences.named_snapshot(bench.catalog, name) for name in (before, after))
    difference = differences.compare(bench.catalog, old, new)
    by_kind = {kind: difference.of_kind(kind) for kind in KINDS}
    return {
        "before": _snapshot(old),
        "after": _snapshot(new),
        "counts": {kind: len(changes) for kind, changes in by_kind.items()},
        **{kind: [_entry(kind, change) for change in changes] for kind, changes in by_kind.items()},
    }


def show_diff(reporter: Reporter, document: dict[str, Any]) -> None:
    """The counts and the first changes of each kind, for a person."""
    before, after = document["before"], document["after"]
    for title, snapshot in (("from", before), ("to", after)):
        reporter.say(
            f"{title:<5} {snapshot['dataset']}@{snapshot['version']}  {snapshot['kept']} kept,"
            f" {snapshot['rejected']} rejected  {snapshot['digest'][:12]}"
        )
    if not any(document["counts"].values()):
        reporter.say("no file differs", "bold")
    for kind, count in document["counts"].items():
        if not count:
            continue
        reporter.say(f"\n{kind} {count}", "bold")
        reporter.table(
            ("file", "before", "now", "why"),
            [
                (entry["file_name"], *(_shortened(entry["told"][part]) for part in ("before", "after", "why")))
                for entry in document[kind][:FIRST]
            ],
        )
        if count > FIRST:
            reporter.say(f"and {count - FIRST} more; --json has them all", "dim")


def export(bench: Bench, name: str, out: Path, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The document of `safelight export-dataset`. Raises BadInput for a version or folder that cannot be used."""
    from components.curation.dataset_folder import export_dataset

    snapshot = differences.named_snapshot(bench.catalog, name)

    def progress(done: int, total: int) -> None:
        on_event({"event": "progress", "stage": "export", "done": done, "total": total})

    made = export_dataset(bench, snapshot, out, on_progress=progress)
    return {
        "snapshot": _snapshot(snapshot),
        "folder": str(made.folder),
        "card": str(made.card),
        "splits": {split.name: {"samples": split.samples, "bytes": split.bytes} for split in made.splits},
        "shards_reused": made.reused,
    }


def show_export(reporter: Reporter, document: dict[str, Any]) -> None:
    """What was written, for a person."""
    for name, split in document["splits"].items():
        reporter.say(f"{name:<5} {split['samples']} samples, {size(split['bytes'])}")
    reporter.say(f"{document['card']}\n{document['folder']}")


def _snapshot(row: SnapshotRow) -> dict[str, Any]:
    return {
        "dataset": row.dataset,
        "version": row.version,
        "digest": row.digest,
        "kept": row.kept,
        "rejected": row.rejected,
    }


def _entry(kind: str, change: Change) -> dict[str, Any]:
    return {
        "file_name": change.file_name,
        "before": _side(change.before, change.verdicts_before),
        "after": _side(change.after, change.verdicts_after),
        "told": asdict(told(kind, change)),
    }


def _side(item: ItemRow | None, verdicts: tuple[VerdictRow, ...]) -> dict[str, Any] | None:
    if item is None:
        return None
    fields = ("file_name", "sha256", "caption", "kept", "split", "licence", "author", "source")
    said = ("check", "decision", "score", "threshold", "reason")
    return {name: getattr(item, name) for name in fields} | {
        "verdicts": [{name: getattr(verdict, name) for name in said} for verdict in verdicts]
    }


def _shortened(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
