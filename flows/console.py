"""What a command says: progress and tables for a person, or one JSON document on stdout with the talk on stderr."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MARKS = {"pass": "+", "hold": "?", "reject": "-"}  # of the gate's checks
DASH = "–"


class Reporter:
    """One command's voice. In JSON mode everything but the final document goes to stderr."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True, markup=False)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str = "", style: str | None = None) -> None:
        """A line for a person."""
        self.console.print(text, style=style)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        title: str | None = None,
        right: Sequence[str] = (),
    ) -> None:
        """A table for a person; columns named in `right` are aligned to the right."""
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
        )
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(DASH if cell is None else str(cell) for cell in row))
        self.console.print(table)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show what a run reports of itself: bars on a terminal, a line per stage elsewhere."""
        kind = event["event"]
        if kind == "progress" and self.console.is_terminal:
            self._bar(event["stage"], event["done"], event["total"])
        elif kind == "stage":
            self._settle()
            self.say(
                f"{event['stage']:<10} {event['outcome']:<9} {seconds(event['seconds']):>8}  {event['items']} items"
            )
        elif kind == "run":
            self.say(f"run {event['run_uid']}", "dim")
        elif kind == "log":
            self.say(str(event["message"]), "dim")

    def finish(self, document: Mapping[str, Any], show: Callable[[], None] | None = None) -> None:
        """End with the JSON document, or with `show` for a person."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self.as_json:
            write_document(document)
        elif show is not None:
            show()

    def _bar(self, stage: str, done: int, total: int | None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                TextColumn("{task.fields[counted]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
        if stage not in self._bars:
            self._settle()
            self._bars[stage] = self._progress.add_task(stage, total=total, counted="")
        self._progress.update(self._bars[stage], completed=done, total=total, counted=counted(done, total))

    def _settle(self) -> None:
        """Take the bar away of what has ended: one thing is done at a time."""
        while self._bars and self._progress is not None:
            self._progress.remove_task(self._bars.popitem()[1])


def write_document(document: Mapping[str, Any], file: IO[str] | None = None) -> None:
    """The one JSON document of a command, on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str), file=file or sys.stdout, flush=True)


def scan_event(step: str, done: int, total: int | None) -> dict[str, Any]:
    """How far a scan of the sources is, as an event; without `total` where nobody knows yet."""
    return {"event": "progress", "stage": step, "done": done, "total": total}


def counted(done: int, total: int | None) -> str:
    """How far something is: "120,000 of 1,000,000", or only the first number where nobody knows the second yet."""
    return f"{done:,}" if total is None else f"{done:,} of {total:,}"


def seconds(value: float | None) -> str:
    """A duration as a person reads it: "0.4 s", "75 s", "12 min", "3.2 h"."""
    if value is None:
        return DASH
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(value: float) -> str:
    """Bytes as a person reads them, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def number(value: float | None) -> str:
    """A metric with four significant digits."""
    return DASH if value is None else f"{value:.4g}"


def show_card(reporter: Reporter, card: Mapping[str, Any]) -> None:
    """The summary of a run for a person: stages, metrics with intervals, the gate's word, the model, the links."""
    snapshot = card.get("snapshot")
    if snapshot:
        reporter.say(
            f"\nsnapshot  {snapshot['name']} v{snapshot['version']}  {snapshot['kept']} kept,"
            f" {snapshot['rejected']} rejected  {snapshot['digest'][:12]}"
        )
        if snapshot.get("captions"):
            show_captions(reporter, snapshot["captions"])
    reporter.say()
    reporter.table(
        ("stage", "outcome", "seconds", "items"),
        [
            (stage["name"], stage["outcome"], f"{stage['seconds']:.1f}", stage["items"])
            for stage in card.get("stages") or []
        ],
        right=("seconds", "items"),
    )
    if card.get("metrics"):
        reporter.say()
        reporter.table(
            ("metric", "candidate", "base", "champion", "difference [95 %]", "better", "n"),
            [_metric_row(name, metric) for name, metric in card["metrics"].items()],
            right=("candidate", "base", "champion", "n"),
        )
    gate = card.get("gate")
    if gate and gate.get("decision"):
        reporter.say(f"\ngate      {gate['decision']}", "bold")
        for reason in gate.get("reasons") or []:
            reporter.say(f"          {MARKS[reason['outcome']]} {reason['sentence']}")
    model = card.get("model")
    if model and model.get("version"):
        aliases = ", ".join(model.get("aliases") or []) or "no alias"
        reporter.say(f"model     {model['name']} version {model['version']} ({aliases})")
    adapter = card.get("adapter")
    if adapter and adapter.get("sha256"):
        reporter.say(f"adapter   step {adapter['step']}  sha256 {adapter['sha256']}")
    for name, address in (card.get("urls") or {}).items():
        if address:
            reporter.say(f"{name:<9} {address}")
    reporter.say(f"status    {card.get('status')}" + (f": {card['error']}" if card.get("error") else ""), "bold")


def show_captions(reporter: Reporter, captions: Mapping[str, Any]) -> None:
    """A snapshot's caption statistics for a person."""
    reporter.say(
        f"captions  {captions['captions']}, {captions['distinct']} of them distinct,"
        f" {captions['identical_share']:.0%} shared by several pictures"
    )
    for reader in captions["tokenizers"]:
        limit = f", it takes {reader['limit']}: {reader['truncated']} are cut" if reader["limit"] else ""
        reporter.say(
            f"          {reader['tokenizer']} tokens: median {number(reader['median'])}, 95 % up to"
            f" {number(reader['p95'])}, longest {reader['longest']}{limit}"
        )
        for worst in reader["worst"]:
            reporter.say(f"          {worst['file_name']} loses “{worst['lost']}”")
    for name in ("tags", "words"):
        if captions[name]:
            reporter.say(f"          {name}: " + ", ".join(f"{one} {count}" for one, count in captions[name][:8]))
    for trigger, count in captions["triggers"].items():
        reporter.say(f"          trigger {trigger!r} in {count} of {captions['captions']}")
    if set(captions["written_by"]) != {"sources"}:
        reporter.say("          by " + ", ".join(f"{by} {count}" for by, count in captions["written_by"].items()))


def _metric_row(name: str, metric: Mapping[str, Any]) -> tuple[Any, ...]:
    difference = metric.get("difference") or {}
    interval = DASH
    if difference.get("value") is not None:
        interval = f"{number(difference['value'])} [{number(difference.get('low'))}, {number(difference.get('high'))}]"
    return (
        name,
        number(metric.get("candidate")),
        number(metric.get("base")),
        number(metric.get("champion")),
        interval,
        metric.get("better"),
        metric.get("n"),
    )
