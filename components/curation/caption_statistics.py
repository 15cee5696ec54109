"""What a snapshot's captions are like, for the people who write them: length by the training tokenizer and what falls
off its end, repetitions, the commonest words and tags, the trigger, and who wrote them.

It is noted in the snapshot's profile, beside the manifest and no part of it: another base reads the same captions.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from components.catalog import datasets
from components.config import DataConfig
from components.curation.manifest import SampleRow, read_manifest
from components.families.bases import BaseModel
from components.families.tokens import CaptionReader, caption_readers
from components.stages import Bench, canonical_json

NAME = "caption_statistics"  # in a profile
VERSION = 1
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
    """Describe a snapshot's captions in its profile."""
    triggers = _triggers(data)
    found = describe_captions(read_manifest(bench.store, manifest), caption_readers(base), triggers)
    found |= {"of": _identity(manifest, base, triggers), "base": base.name}
    datasets.note_in_profile(bench.catalog, snapshot_id, NAME, found)
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
    said = [(row.file_name, text) for row in rows for text in (row.text, *row.variants)]
    texts = [text for _, text in said]
    alike = Counter(" ".join(text.lower().split()) for text in texts)
    return {
        "captions": len(texts),
        "distinct": len(alike),
        "identical_share": sum(count for count in alike.values() if count > 1) / max(1, len(texts)),
        "words": _commonest(word for text in texts for word in set(_words(text))),
        "tags": _commonest(tag for text in texts for tag in set(_tags(text))),
        "triggers": {trigger: sum(trigger in text for text in texts) for trigger in triggers},
        "written_by": dict(Counter(row.caption_by or "sources" for row in rows).most_common()),
        "tokenizers": [_lengths(said, reader) for reader in readers],
    }


def _lengths(said: Sequence[tuple[str, str]], reader: CaptionReader) -> dict[str, Any]:
    counts = reader.count([text for _, text in said])
    beyond = [i for i, count in enumerate(counts) if reader.limit is not None and count > reader.limit]
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
