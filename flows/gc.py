"""`safelight gc`: what the object store holds and nothing needs; counted, and deleted when a person says so."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from components.catalog import runs
from components.catalog.models import now
from components.garbage import Leftover, Pile, StoredObject, survey, sweep
from components.stages import Bench
from components.stale import find_stale, forget
from flows.console import Reporter, size
from flows.deployments import parse_span
from flows.reconcile import is_dead

PILES = {"reachable": "needed", "young": "not needed, but young", "unreachable": "not needed"}
SHORTEST_S = 3600  # work without a run, such as a notebook's, has this long to commit what it has put
CLOCKS = timedelta(minutes=5)  # in which the clocks of hosts and file servers may differ


def collect(bench: Bench, older_than: str, *, delete: bool) -> dict[str, Any]:
    """The document of `safelight gc`. Raises BadInput for a span that is none or too short, DamagedArtifact.

    Nothing that was put or wanted since the beginning of the oldest living run is touched, however long that takes, and
    cached latents are dropped only while no run is at work.
    """
    span = parse_span(older_than, option="--older-than", shortest_s=SHORTEST_S)
    running = runs.running(bench.catalog)
    living = [run for run in running if not is_dead(run)]
    dead = frozenset((run.run_uid, run.heartbeat_at) for run in running if run not in living)
    before = min([now() - timedelta(seconds=span), *(run.created_at - CLOCKS for run in living)])
    stale = find_stale(bench, before, dead)
    found = survey(bench, before, stale)
    if delete and not found.damaged and not forget(bench, stale, dead):
        found = survey(bench, before)
    deleted = sweep(bench, found) if delete else Pile(0, 0)
    return {
        "dry_run": not delete,
        "older_than_s": span,
        "before": before,
        "running": [run.run_uid for run in living],
        "reachable": _counted(found.reachable),
        "young": _counted(found.young),
        "unreachable": _counted((*found.garbage, *found.leftovers)),
        "damaged": list(found.damaged),
        "deleted": _pile(deleted),
    }


def show(reporter: Reporter, document: dict[str, Any]) -> None:
    """The count for a person, largest first, and what to type to delete."""
    reporter.table(
        ("objects are", "what", "number", "bytes"),
        [
            (words, kind, pile["objects"], size(pile["bytes"]))
            for of, words in PILES.items()
            for kind, pile in document[of]["kinds"].items()
        ],
        right=("number", "bytes"),
    )
    for run in document["running"]:
        reporter.say(f"run {run} is at work: nothing that is younger than it counts as not needed", "dim")
    for sha256 in document["damaged"]:
        reporter.say(f"object {sha256} was altered: what rests on it is not known, so nothing can be deleted", "bold")
    rest, deleted = document["unreachable"], document["deleted"]
    if not document["dry_run"]:
        reporter.say(f"deleted {deleted['objects']} objects, {size(deleted['bytes'])}", "bold")
    elif rest["objects"]:
        reporter.say(
            f"{rest['objects']} objects, {size(rest['bytes'])}, are needed by nothing and were last wanted before"
            f" {document['before']:%Y-%m-%d %H:%M} UTC; `safelight gc --yes` deletes them"
        )
    else:
        reporter.say("nothing to delete")


def _counted(found: Iterable[StoredObject | Leftover]) -> dict[str, Any]:
    by_kind: dict[str, list[StoredObject | Leftover]] = {}
    for one in found:
        by_kind.setdefault(one.kind, []).append(one)
    piles = sorted(((kind, Pile.of(members)) for kind, members in by_kind.items()), key=lambda p: -p[1].bytes)
    whole = Pile(sum(pile.objects for _, pile in piles), sum(pile.bytes for _, pile in piles))
    return _pile(whole) | {"kinds": {kind: _pile(pile) for kind, pile in piles}}


def _pile(pile: Pile) -> dict[str, int]:
    return {"objects": pile.objects, "bytes": pile.bytes}
