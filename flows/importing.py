"""`safelight import-config`: what became of every key of another trainer's configuration, as a document and a table."""

from dataclasses import asdict
from typing import Any

from components.importers.importing import Import
from flows.console import Reporter

OUTCOMES = ("mapped", "note", "unknown", "ignored")  # in the order in which they are shown


def document_of(done: Import) -> dict[str, Any]:
    """What the command says with --json."""
    return {
        "trainer": done.trainer,
        "recipe": str(done.path),
        "keys": [asdict(line) for outcome in OUTCOMES for line in done.lines if line.outcome == outcome],
    }


def show(reporter: Reporter, document: dict[str, Any]) -> None:
    """The table for a person: ignored keys with one reason share a line."""
    rows, ignored = [], {}
    for line in document["keys"]:
        if line["outcome"] == "ignored":
            ignored.setdefault(line["said"], []).append(line["key"])
        else:
            rows.append((line["outcome"], line["key"], line["said"]))
    rows += [("ignored", ", ".join(dict.fromkeys(keys)), reason) for reason, keys in ignored.items()]
    reporter.table((f"{document['trainer']}'s", "key", "what becomes of it"), rows)
    reporter.say(f"\nwrote {document['recipe']}\nnext: safelight plan {document['recipe']}")
