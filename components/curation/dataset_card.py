"""The card of an exported dataset: README.md in the format of the Hugging Face hub, written from the catalog alone.

What is not known is left out, never a placeholder: nobody told Safelight in which language captions are, or who wrote
them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import select

from components.catalog import datasets
from components.catalog.database import Catalog
from components.catalog.datasets import SnapshotRow
from components.catalog.models import Run, Snapshot, StageRun
from components.curation.manifest import SampleRow
from components.storage import atomic_write

SHOWN = 20  # values of a count; the others are one line
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LARGEST = "1M<n<10M"
HUB_LICENCES = frozenset({  # ids of the hub that pictures come under; SPDX's in lower case, but for "unknown"
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "wtfpl", "zlib", "0bsd", "cc0-1.0",
    *(f"cc-by-{version}" for version in ("2.0", "2.5", "3.0", "4.0")), "cc-by-sa-3.0", "cc-by-sa-4.0",
    *(f"cc-by-nc-{version}" for version in ("2.0", "3.0", "4.0")), "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", *(f"cc-by-nc-sa-{version}" for version in ("2.0", "3.0", "4.0")), "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0",
    "ofl-1.1", "odc-by", "odbl", "pddl", "gfdl", "etalab-2.0",
})


@dataclass(frozen=True, slots=True)
class SplitFiles:
    """A split as it lies in the folder: data/<name>-*.parquet."""

    name: str
    samples: int
    bytes: int


def write_card(
    catalog: Catalog,
    snapshot: SnapshotRow,
    rows: Sequence[SampleRow],
    splits: Sequence[SplitFiles],
    features: Mapping[str, Mapping[str, Any]],
    path: Path,
) -> None:
    """Write the card; `features` are the columns' types as `datasets` writes them into a file."""
    rules = _rules(catalog, snapshot)
    parts = [
        _front_matter(snapshot, rows, splits, features), f"# {_plain(snapshot.dataset)} v{snapshot.version}",
        _introduction(snapshot, splits), _counts("licence", (row.licence for row in rows), "Licences"),
        _counts("source", (_place(row.source) for row in rows), "Sources"),
        _counts("author", (row.author for row in rows), "Authors"), _captions(catalog, snapshot, rows),
        _curation(catalog, snapshot, rules), _split_method(rules, rows)]
    with atomic_write(path) as file:
        file.write(("\n\n".join(part for part in parts if part) + "\n").encode())


def _front_matter(snapshot: SnapshotRow, rows: Sequence[SampleRow], splits: Sequence[SplitFiles],
                  features: Mapping[str, Mapping[str, Any]]) -> str:
    size = next((name for limit, name in SIZES if len(rows) < limit), LARGEST)
    lines = ["---", *_licences(row.licence for row in rows), f"pretty_name: {json.dumps(snapshot.dataset)}",
             f"size_categories: [{size}]", "task_categories: [text-to-image]", "source_datasets: [original]",
             f"annotations_creators: [{', '.join(_creators(rows))}]", "tags: [safelight]", "configs:",
             "  - config_name: default", "    data_files:"]
    for split in splits:
        lines += [f"      - split: {split.name}", f"        path: data/{split.name}-*"]
    lines += ["dataset_info:", "  features:"]
    for name, feature in features.items():
        kind = "list: string" if feature["_type"] == "List" else f"dtype: {feature.get('dtype', 'image')}"
        lines += [f"    - name: {name}", f"      {kind}"]
    lines += ["  splits:"]
    for split in splits:
        lines += [f"    - name: {split.name}", f"      num_bytes: {split.bytes}",
                  f"      num_examples: {split.samples}"]
    total = sum(split.bytes for split in splits)
    return "\n".join([*lines, f"  download_size: {total}", f"  dataset_size: {total}", "---"])


def _creators(rows: Sequence[SampleRow]) -> list[str]:
    """The hub's words for who captioned: as found, or a model (name@revision), or a person in Safelight."""
    by = {row.caption_by for row in rows}
    found = {"found" if one is None else "machine-generated" if "@" in one else "expert-generated" for one in by}
    return sorted(found) or ["found"]


def _licences(stated: Iterable[str | None]) -> list[str]:
    """The hub's ids; a licence that the hub does not know is "other", told under its own name in the card."""
    found = {licence or "unknown" for licence in stated}
    known = sorted({licence.lower() for licence in found} & (HUB_LICENCES | {"unknown"}))
    others = sorted(licence for licence in found if licence.lower() not in HUB_LICENCES | {"unknown"})
    ids = [*known, *(["other"] if others else [])]
    lines = ["license:", *(f"  - {name}" for name in ids)] if len(ids) > 1 else [f"license: {ids[0]}"]
    return [*lines, f"license_name: {json.dumps(' and '.join(others))}", "license_link: README.md"] if others else lines


def _introduction(snapshot: SnapshotRow, splits: Sequence[SplitFiles]) -> str:
    counted = ", ".join(f"{split.samples} in `{split.name}`" for split in splits)
    return (
        f"Captioned pictures, frozen by Safelight on {snapshot.created_at:%Y-%m-%d} as version {snapshot.version}: "
        f"{counted}. Manifest sha256 `{snapshot.digest}`. The pictures are the original files; `sha256` names their "
        "bytes.\n\n```python\nfrom datasets import load_dataset\n\nload_dataset(\"<this folder>\")\n```")


def _captions(catalog: Catalog, snapshot: SnapshotRow, rows: Sequence[SampleRow]) -> str:
    flags = {count.check: count.files for count in datasets.verdict_counts(catalog, snapshot.id)}
    folders = flags.get("caption_fallback", 0)
    varied = sum(bool(row.variants) for row in rows)
    return ("## Captions\n\n"
            f"{len({row.text for row in rows})} different captions, {_authorship(rows)}"
            + (f" {folders} files had none and took the words of their folder." if folders else "")
            + (f" {varied} samples have further captions in `variants`." if varied else ""))


def _authorship(rows: Sequence[SampleRow]) -> str:
    by = Counter(row.caption_by for row in rows if row.caption_by)
    if not by:
        return "as they stood beside the pictures; Safelight wrote none of them and does not know who did."
    written = ", ".join(f"{_plain(author)} {count}" for author, count in by.most_common())
    return (f"{len(rows) - by.total()} of the samples' as they stood beside the pictures, the others written in "
            f"Safelight, by people or by models (name@revision): {written}.")


def _curation(catalog: Catalog, snapshot: SnapshotRow, rules: Mapping[str, Any]) -> str:
    lines = ["## Curation", "", f"{snapshot.kept} files were kept, {snapshot.rejected} rejected."]
    counts = datasets.verdict_counts(catalog, snapshot.id)
    if counts:
        lines += ["", "| check | decision | files |", "|---|---|---|",
                  *(f"| {count.check} | {count.decision} | {count.files} |" for count in counts)]
    stated = {name: value for name, value in rules.items() if value is not None}
    if stated:
        lines += ["", "| rule | value |", "|---|---|",
                  *(f"| `{name}` | {_plain(str(value))} |" for name, value in stated.items())]
    return "\n".join(lines)


def _split_method(rules: Mapping[str, Any], rows: Sequence[SampleRow]) -> str:
    components = len({row.component for row in rows})
    lot = ("by a hash of its name" if "test_fraction" not in rules else
           f"by a hash of its name with `{rules['split_salt']}`, a share of {rules['test_fraction']} to test")
    return ("## Splits\n\nPictures with equal pixels, near duplicates and pictures of one `group` form a component "
            f"(`component`, {components} of them), and a component is never divided. A component goes where its source "
            f"says; where that says nothing it stays on the side that it had in the version before, or is drawn {lot}.")


def _rules(catalog: Catalog, snapshot: SnapshotRow) -> dict[str, Any]:
    """The curation settings of a run that made or reused the snapshot; empty where it was made without a run."""
    query = (select(Run.recipe).join(StageRun, StageRun.run_uid == Run.run_uid)
             .join(Snapshot, Snapshot.stage_key == StageRun.key)
             .where(Snapshot.id == snapshot.id, StageRun.stage == "curate").order_by(Run.run_uid.desc()).limit(1))
    with catalog.read() as session:
        recipe = session.scalar(query)
    return dict((recipe or {}).get("curation", {}))


def _counts(word: str, values: Iterable[str | None], title: str) -> str:
    """A table of how many pictures have which value; nothing where none states one and it is not the licence."""
    counts = Counter(values).most_common()
    if word != "licence" and [value for value, _ in counts] == [None]:
        return ""
    lines = [f"## {title}", "", f"| {word} | pictures |", "|---|---|"]
    lines += [f"| {_plain(value) if value else 'not stated'} | {count} |" for value, count in counts[:SHOWN]]
    if len(counts) > SHOWN:
        lines.append(f"| {len(counts) - SHOWN} others | {sum(count for _, count in counts[SHOWN:])} |")
    return "\n".join(lines)


def _place(source: str | None) -> str | None:
    """Of an address the host, of a path its last part: what can be counted, and tells nothing of anybody's disk."""
    if source is None:
        return None
    address = urlsplit(source)
    return address.hostname if address.scheme in ("http", "https") and address.hostname else PurePath(source).name


def _plain(words: str) -> str:
    """Words from a file or a person as plain text in a Markdown table: no markup, no line ends."""
    return "".join("\\" + letter if letter in "\\`*_{}[]<>#|!" else letter for letter in " ".join(words.split()))
