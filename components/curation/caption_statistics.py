"""What a snapshot's captions are like, for the people who write them: length by the training tokenizer and what falls
off its end, repetitions, the commonest words and tags, the trigger, and who wrote them.

It is noted in the snapshot's profile, and as a flag of each picture whose caption is cut, beside the manifest and no
part of it: another base reads the same captions, so neither the snapshot nor its key may depend on one. What is noted
is of the base that asked last.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.catalog import datasets
from components.catalog.datasets import Noted
from components.config import DataConfig
from components.curation.manifest import SampleRow, read_manifest
from components.families.bases import BaseModel
from components.families.tokens import CaptionReader, caption_readers
from components.stages import Bench, canonical_json

NAME = "caption_statistics"  # in a profile
CUT = "caption_tokens"  # the check that flags a picture
CUT_VERSION = "1"  # of the check
VERSION = 2  # of all that is noted
COMMONEST = 15  # words and tags
WORST = 5  # captions that lose most
LOST = 200  # characters of what is lost that are kept
SAY_LITTLE = frozenset(
    (
        "a",
        "an",
        "and",
        "are",
        "at",
        "by",
        "for",
        "from",
        "in",
        "is",
        "its",
        "of",
        "on",
        "or",
        "that",
        "the",
        "this",
        "to",
        "with",
    )
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Every caption of a snapshot, and how many tokens each one has for one tokenizer."""

    reader: CaptionReader
    said: Sequence[tuple[str, str]]  # file name and caption, of variants as well
    tokens: Sequence[int]

    @property
    def beyond(self) -> list[int]:
        """Which captions are longer than the tokenizer takes."""
        limit = self.reader.limit
        return [i for i, count in enumerate(self.tokens) if limit is not None and count > limit]


def noted_statistics(
    bench: Bench, snapshot_id: int, manifest: str, base: BaseModel, data: DataConfig
) -> dict[str, Any] | None:
    """The statistics that are in a snapshot's profile, or None where they are of another base or other triggers."""
    snapshot = datasets.get_snapshot(bench.catalog, snapshot_id)
    found = (snapshot.profile if snapshot else {}).get(NAME)
    return found if found and found["of"] == _identity(manifest, base, _triggers(data)) else None


def note_caption_statistics(
    bench: Bench, snapshot_id: int, manifest: str, base: BaseModel, data: DataConfig
) -> dict[str, Any]:
    """Describe a snapshot's captions in its profile, and flag the pictures of which the base reads not all."""
    triggers, rows = _triggers(data), read_manifest(bench.store, manifest)
    lengths = [counted(rows, reader) for reader in caption_readers(base)]
    found = _described(rows, lengths, triggers) | {"of": _identity(manifest, base, triggers), "base": base.name}
    datasets.note_check(bench.catalog, snapshot_id, CUT, cut_captions(lengths, base.name))
    datasets.note_in_profile(bench.catalog, snapshot_id, NAME, found)  # last: with it all that is noted is there
    return found


def _triggers(data: DataConfig) -> list[str]:
    return sorted({source.trigger for source in data.sources if source.trigger})


def _identity(manifest: str, base: BaseModel, triggers: list[str]) -> str:
    """What statistics are of: they are as they were while this is."""
    return hashlib.sha256(canonical_json([VERSION, manifest, base.digest, triggers])).hexdigest()[:16]


def describe_captions(
    rows: Sequence[SampleRow], readers: Sequence[CaptionReader], triggers: Sequence[str] = ()
) -> dict[str, Any]:
    """Counts over every caption, variants included; the worst of each tokenizer are those that lose most."""
    return _described(rows, [counted(rows, reader) for reader in readers], triggers)


def cut_captions(lengths: Sequence[Lengths], base: str) -> dict[str, Noted]:
    """A flag for each picture with a caption that one of the tokenizers cuts, by file name: where most is lost."""
    worst: dict[str, tuple[int, Lengths, int]] = {}
    for found in lengths:
        for i in found.beyond:
            name, _ = found.said[i]
            lost = found.tokens[i] - (found.reader.limit or 0)
            if name not in worst or lost > worst[name][0]:
                worst[name] = (lost, found, i)
    return {name: _flag(found, i, base) for name, (_, found, i) in worst.items()}


def _flag(found: Lengths, i: int, base: str) -> Noted:
    reader, tokens = found.reader, found.tokens[i]
    said = f"The caption has {tokens} tokens, {base} ({reader.name}) reads {reader.limit}"
    lost = reader.lost(found.said[i][1])[:LOST].strip()
    reason = f"{said}: “{lost}” is cut off." if lost else f"{said}: its end is cut off."
    return Noted("flag", float(tokens), float(reader.limit or 0), reason, CUT_VERSION)


def counted(rows: Sequence[SampleRow], reader: CaptionReader) -> Lengths:
    """How long the rows' captions are for a tokenizer."""
    said = [(row.file_name, text) for row in rows for text in (row.text, *row.variants)]
    return Lengths(reader, said, reader.count([text for _, text in said]))


def _described(rows: Sequence[SampleRow], lengths: Sequence[Lengths], triggers: Sequence[str]) -> dict[str, Any]:
    texts = [text for row in rows for text in (row.text, *row.variants)]
    alike = Counter(" ".join(text.lower().split()) for text in texts)
    return {
        "captions": len(texts),
        "distinct": len(alike),
        "identical_share": sum(count for count in alike.values() if count > 1) / max(1, len(texts)),
        "words": _commonest(word for text in texts for word in set(_words(text))),
        "tags": _commonest(tag for text in texts for tag in set(_tags(text))),
        "triggers": {trigger: sum(trigger in text for text in texts) for trigger in triggers},
        "written_by": dict(Counter(row.caption_by or "sources" for row in rows).most_common()),
        "tokenizers": [_summed_up(found) for found in lengths],
    }


def _summed_up(found: Lengths) -> dict[str, Any]:
    reader, said, counts, beyond = found.reader, found.said, found.tokens, found.beyond
    worst = sorted(beyond, key=lambda i: (-counts[i], said[i][0]))[:WORST]
    return {
        "tokenizer": reader.name,
        "limit": reader.limit,
        "median": float(np.median(counts)) if counts else 0.0,
        "p95": float(np.percentile(counts, 95)) if counts else 0.0,
        "longest": max(counts, default=0),
        "truncated": len(beyond),
        "worst": [
            {"file_name": said[i][0], "tokens": counts[i], "lost": reader.lost(said[i][1])[:LOST]} for i in worst
        ],
    }


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower()) if word not in SAY_LITTLE]


def _tags(text: str) -> list[str]:
    """What stands between commas, in a caption that has any."""
    parts = [part.strip() for part in text.split(",")]
    return [part for part in parts if part] if len(parts) > 1 else []


def _commonest(found: Any) -> list[list[Any]]:
    counts = Counter(found)
    return [[one, count] for one, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:COMMONEST]]
