"""Snapshots: from sources to an immutable, versioned manifest, with a verdict on whatever was flagged or left out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from components.catalog import datasets
from components.catalog.models import Snapshot, SnapshotItem
from components.catalog.models import Verdict as VerdictRow
from components.config import CaptionsConfig, CurationConfig, DataConfig
from components.curation.checks import EXAMINE_VERSION, ImageFacts, check_rules, looked_at, tell_profile
from components.curation.choosing import scan_captioned
from components.curation.examining import OnProgress, examine_files, read_masks
from components.curation.features import embedded, feature_pairs, judge_features, near_cosine
from components.curation.judging import Measure, judge_by_models, no_models, revisions_of
from components.curation.manifest import (
    MANIFEST_SCHEMA,
    OPTIONAL_FIELDS,
    SKIPPED_SCHEMA,
    VERDICT_SCHEMA,
    SampleRow,
    cells,
    parquet,
)
from components.curation.profiles import Thresholds, ToldProfile
from components.curation.scanning import OnScan, Scan, unheard
from components.curation.sifting import Batch, near_pairs
from components.curation.sources import SourceReading
from components.curation.splits import Member, Pair, assign_splits, component_name, join_components, prove_disjoint
from components.errors import BadInput
from components.evaluation.model_sources import feature_key
from components.stages import Bench, Product, canonical_json, stage_key
from components.storage import ObjectRef

INSERT_ROWS = 1000
GONE = "sides_of_gone"  # in a profile: of pictures that the snapshot's folder held as duplicates and holds no more


def curate_key(bench: Bench, data: DataConfig, curation: CurationConfig, *, dataset: str, training_size: int,
               captions: CaptionsConfig | None = None, verify: bool = False, on_progress: OnScan = unheard,
               scanned: Scan | None = None) -> tuple[str, Scan]:
    """The stage key of curating these sources as they are now, and the scan behind it, `scanned` if that was made.

    The scan holds the captions that were chosen, so the key changes when one of them does, and not when others are
    stored. How a base's tokenizer reads them is noted later, by caption_statistics.py, and is no part of it.
    """
    found = scanned or scan_captioned(bench, data, captions or CaptionsConfig(), dataset=dataset, verify=verify,
                                      on_progress=on_progress)
    config = curation.settings() | {
        "dataset": dataset, "training_size": training_size, "examine": EXAMINE_VERSION,
        "tokenizer": ""}  # what it was before captions were counted elsewhere, so that keys are what they were
    if not data.copy_pictures:  # the snapshot is the same, but whoever wants copies later has them made
        config |= {"copy_pictures": False}
    return stage_key("curate", inputs={"sources": found.digest} | _models(curation), config=config), found


def _models(curation: CurationConfig) -> dict[str, str]:
    """The revisions of the models that look at the pictures, where the recipe asks any."""
    embedder = curation.near_duplicate_embedder
    return revisions_of(curation) | ({"near_duplicate_embedder": feature_key(embedder)} if embedder else {})


def curate(bench: Bench, data: DataConfig, curation: CurationConfig, *, dataset: str, training_size: int,
           on_progress: OnProgress = lambda done, total: None, scanned: Scan | None = None, key: str = "",
           measure: Measure = no_models) -> Product:
    """Check, deduplicate and split the sources' pictures; store what is readable and write down every verdict.

    `measure` has models look at pictures, where the recipe asks for that.

    The manifest's bytes depend on the files, the configuration and the dataset's earlier splits alone. `facts` says how
    many images were really decoded. Raises BadInput when nothing is left, when `strict` meets a reject, and when the
    data itself asks for a duplicate or a group to be on both sides of the split.
    """
    found = scanned or scan_captioned(bench, data, CaptionsConfig(), dataset=dataset)
    examined, decoded = examine_files(bench, found.files, on_progress, copied=data.copy_pictures)
    files, masks = read_masks(bench.store, found.files, examined)
    batch = Batch(files, [examined.get(file.sha256) if file.sha256 else None for file in files])
    told = _profile(bench, batch, curation)
    rules = check_rules(curation, training_size, profile=told.profile)
    batch.judge(rules)
    _judge_by_models(bench, batch, curation, measure)

    usable = batch.kept  # fit for training; duplicates among them still hold components together
    seen = _seen_pairs(bench, batch, usable, curation, told, rules.thresholds, measure)
    pairs = sorted({*near_pairs(bench, batch, usable, curation, rules.thresholds), *seen.pairs})
    members = [_member(batch, i) for i in usable]
    components = join_components(members, pairs)
    earlier = _earlier_splits(bench, dataset, curation, [member.identity for member in members])
    splits = assign_splits(members, components, test_fraction=curation.test_fraction, salt=curation.split_salt,
                           earlier=earlier)
    batch.drop_exact_duplicates()
    if curation.near_duplicates:
        batch.drop_near_duplicates([(usable[i], usable[j]) for i, j in pairs])
    if not batch.kept:
        raise BadInput(f"no picture is left of {len(found.files)}: {batch.why_rejected()}; mend the data or the limits")
    if curation.strict and (first := batch.first_reject()):
        raise BadInput(f"{first}; mend or remove the file, or set curation.strict=false")
    _prove_disjoint(bench, batch, dict(zip(usable, splits, strict=True)), curation, rules.thresholds,
                    [(usable[i], usable[j]) for i, j in seen.pairs])

    names = _component_names(members, components)
    rows = sorted((_sample_row(batch, i, name, side, masks) for i, name, side in zip(usable, names, splits, strict=True)
                   if not batch.rejected(i)), key=lambda row: (row.split, row.file_name, row.sha256))
    schema = MANIFEST_SCHEMA
    for optional in OPTIONAL_FIELDS:
        schema = schema.append(optional) if any(getattr(row, optional.name) for row in rows) else schema
    manifest = bench.store.put(parquet(map(cells, rows), schema))
    verdicts = bench.store.put(parquet(batch.verdict_rows(), VERDICT_SCHEMA))
    profile_facts = _describe(batch, rows, curation, told, seen.cosine) | _describe_sources(found.sources)
    skipped = [asdict(one) | {"source": source.path} for source in found.sources for one in source.skipped]
    listed = {"skipped": bench.store.put(parquet(skipped, SKIPPED_SCHEMA))} if skipped else {}
    sides = dict(zip(usable, splits, strict=True))
    snapshot = _record(bench, batch, rows, manifest, sides, dataset=dataset, key=key, profile=profile_facts)
    facts = profile_facts | {
        "dataset": dataset, "version": snapshot.version, "digest": manifest.sha256, "snapshot_id": snapshot.id,
        "kept": snapshot.kept, "rejected": snapshot.rejected, "train": profile_facts["splits"].get("train", 0),
        "test": profile_facts["splits"].get("test", 0), "examined": decoded, "hashed": found.hashed,
        "overruled": _overruled({member.identity: side for member, side in zip(members, splits, strict=True)}, earlier)}
    return Product({"manifest": manifest, "verdicts": verdicts, **listed}, facts, items=len(found.files))


# what the pictures are, and what models say of them -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeenPairs:
    """Near duplicates by features, as positions among the usable pictures; none without an embedder."""

    pairs: list[Pair]
    cosine: float | None  # from which on features are near


def _profile(bench: Bench, batch: Batch, curation: CurationConfig) -> ToldProfile:
    if curation.profile != "auto":
        return ToldProfile(curation.profile, 1.0, "The recipe says so.")
    readable = {i: facts for i, facts in enumerate(batch.facts) if isinstance(facts, ImageFacts)}
    wanted = {facts.rgb_digest for facts in looked_at(list(readable.values()))}
    looks = batch.looks(bench, [i for i, facts in readable.items() if facts.rgb_digest in wanted])
    return tell_profile(list(readable.values()), looks)


def _judge_by_models(bench: Bench, batch: Batch, curation: CurationConfig, measure: Measure) -> None:
    """What plug-ins flag or reject among the pictures that every other check keeps."""
    kept = batch.kept
    said = judge_by_models(bench, curation, [batch.subject(i) for i in kept], measure)
    for i, verdicts in zip(kept, said, strict=True):
        batch.verdicts[i] += [verdict for verdict in verdicts if verdict.decision != "keep"]


def _seen_pairs(bench: Bench, batch: Batch, usable: Sequence[int], curation: CurationConfig, told: ToldProfile,
                thresholds: Thresholds, measure: Measure) -> SeenPairs:
    """Near duplicates by features, and a flag on pictures that are unlike all others, where the recipe asks."""
    if curation.near_duplicate_embedder is None or not usable:
        return SeenPairs([], None)
    features = embedded(bench, curation, [batch.subject(i) for i in usable], measure)
    for i, verdict in zip(usable, judge_features(features, thresholds), strict=True):
        if verdict is not None:
            batch.verdicts[i].append(verdict)
    cosine = near_cosine(curation, features, told.profile)
    return SeenPairs(feature_pairs(features, cosine), cosine)


# splitting ----------------------------------------------------------------------------------------------------------


def _member(batch: Batch, i: int) -> Member:
    item = batch.files[i].item
    return Member(item.file_name, batch.image(i).rgb_digest, item.group, "train" if item.is_reg else item.split)


def _earlier_splits(bench: Bench, dataset: str, curation: CurationConfig, identities: Sequence[str]) -> dict[str, str]:
    """The side of each identity in the dataset's newest snapshot that has it, of those under this salt and fraction.

    Not only in the latest: a picture that was taken out and comes back must not be tested on after it was trained on.
    Nor only of those that were kept: what was trained on may have been the twin of one that was dropped.
    """
    snapshots = [row for row in datasets.list_snapshots(bench.catalog, dataset)
                 if row.profile.get("lots") == _lots(curation)]
    ids = [row.id for row in snapshots]
    found = datasets.splits_of(bench.catalog, ids[0]) if ids else {}
    missing = [identity for identity in identities if identity not in found]
    found = datasets.splits_of_pictures(bench.catalog, ids[1:], missing) | found
    gone = [entry for row in reversed(snapshots) for entry in row.profile.get(GONE, {}).items()]
    return found | {identity: side for identity, side in gone if side == "train" or identity not in found}


def sides_stand(bench: Bench, curation: CurationConfig, dataset: str, product: Product) -> bool:
    """Whether a committed snapshot's sides are still those that its pictures would get, so that it can be reused.

    Snapshots that were made since may have moved a picture to train. Their sides are no part of the key, where they
    belong by what they do: a snapshot is itself one of them from the moment it is made, and would never be found again
    under the key that it was made for.
    """
    newest = next((row for row in datasets.list_snapshots(bench.catalog, dataset)
                   if row.profile.get("lots") == _lots(curation)), None)
    if newest is None or newest.id == product.facts["snapshot_id"]:
        return True
    own = datasets.splits_of(bench.catalog, product.facts["snapshot_id"])
    now = _earlier_splits(bench, dataset, curation, list(own))
    return _overruled(own, now) in (None, product.facts.get("overruled"))


def _overruled(sides: Mapping[str, str], earlier: Mapping[str, str]) -> str | None:
    """Names the earlier sides that a snapshot did not follow, since its data says otherwise or joins two of them."""
    against = sorted((identity, earlier[identity]) for identity, side in sides.items()
                     if earlier.get(identity, side) != side)
    return hashlib.sha256(canonical_json(against)).hexdigest() if against else None


def _lots(curation: CurationConfig) -> dict[str, Any]:
    return {"salt": curation.split_salt, "test_fraction": curation.test_fraction}


def _component_names(members: Sequence[Member], components: Sequence[int]) -> list[str]:
    """For each member, the name of its component."""
    inside: dict[int, list[Member]] = {}
    for member, component in zip(members, components, strict=True):
        inside.setdefault(component, []).append(member)
    names = {component: component_name(found) for component, found in inside.items()}
    return [names[component] for component in components]


def _prove_disjoint(bench: Bench, batch: Batch, splits: Mapping[int, str], curation: CurationConfig,
                    thresholds: Thresholds, seen: Sequence[Pair]) -> None:
    """Look for near duplicates once more, among what is kept: not one pair may cross the split, nor one of `seen`."""
    kept = batch.kept
    place = {i: position for position, i in enumerate(kept)}
    pairs = near_pairs(bench, batch, kept, curation, thresholds)
    pairs += [(place[i], place[j]) for i, j in seen if i in place and j in place]
    prove_disjoint([_member(batch, i) for i in kept], [splits[i] for i in kept], pairs)


# writing down -------------------------------------------------------------------------------------------------------


def _sample_row(batch: Batch, i: int, component: str, split: str, masks: Mapping[str, str]) -> SampleRow:
    file, facts = batch.files[i], batch.image(i)
    item = file.item
    return SampleRow(
        sha256=str(file.sha256), rgb_digest=facts.rgb_digest, file_name=item.file_name, text=item.caption,
        group=item.group, component=hashlib.sha256(component.encode()).hexdigest()[:16], split=split,
        width=facts.width, height=facts.height, licence=item.licence, author=item.author, source=item.source,
        repeats=item.repeats, mask=masks.get(item.file_name), variants=item.variants,
        is_reg=item.is_reg, caption_by=item.caption_by)


def _describe(batch: Batch, rows: Sequence[SampleRow], curation: CurationConfig, told: ToldProfile,
              cosine: float | None) -> dict[str, Any]:
    """The snapshot's profile: what the dashboard and the dataset card say of the set."""
    def counts(values: Iterable[object]) -> dict[str, int]:
        return {str(value): number for value, number in Counter(values).most_common()}

    words = [len(row.text.split()) for row in rows]
    return {
        "kind": told.profile,
        "kind_share": round(told.share, 4),
        "kind_why": told.why,
        "splits": counts(row.split for row in rows),
        "licences": counts(row.licence or "not stated" for row in rows),
        "authors": counts(row.author or "not stated" for row in rows),
        "sizes": dict(list(counts(f"{row.width}x{row.height}" for row in rows).items())[:20]),
        "groups": len({row.group for row in rows if row.group is not None}),
        "components": len({row.component for row in rows}),
        "captions": {"distinct": len({row.text for row in rows}), "words_median": float(np.median(words)),
                     "words_max": max(words)},
        "caption_verdict": asdict(batch.caption_verdict) if batch.caption_verdict else None,
        "rejects": counts(v.check for verdicts in batch.verdicts for v in verdicts if v.decision == "reject"),
        "flags": counts(v.check for verdicts in batch.verdicts for v in verdicts if v.decision == "flag"),
        "repeats": counts(row.repeats for row in rows),
        "lots": _lots(curation),
    } | ({"near_cosine": round(cosine, 6)} if cosine is not None else {})


def _describe_sources(sources: Sequence[SourceReading]) -> dict[str, Any]:
    """Which layout each source has, and how many of its files were skipped for which reason."""
    return {"sources": [
        {"path": source.path, "layout": source.layout, "pictures": source.pictures,
         "skipped": {reason: len(names) for reason, names in source.reasons.items()}} for source in sources]}


def _record(bench: Bench, batch: Batch, rows: Sequence[SampleRow], manifest: ObjectRef, sides: Mapping[int, str], *,
            dataset: str, key: str, profile: dict[str, Any]) -> datasets.SnapshotRow:
    """Write the snapshot's rows, all or none. A manifest that the dataset had before keeps its version.

    `sides` are those of the usable files by their positions, of dropped duplicates as well.
    """
    kept = {row.file_name: row for row in rows}
    ordered = sorted(range(len(batch.files)), key=lambda i: (batch.rejected(i), batch.name(i)))
    items = (  # a rejected file's name may look like another's
        _item_values(batch, i, ordinal, None if batch.rejected(i) else kept[batch.name(i)], sides.get(i))
        for ordinal, i in enumerate(ordered))
    verdicts = (cells(verdict) | {"ordinal": ordinal}
                for ordinal, i in enumerate(ordered) for verdict in batch.verdicts[i])
    with bench.catalog.write() as session:
        snapshot = session.scalar(
            select(Snapshot).where(Snapshot.dataset == dataset, Snapshot.digest == manifest.sha256))
        if snapshot is None:
            newest = session.scalar(select(func.max(Snapshot.version)).where(Snapshot.dataset == dataset)) or 0
            snapshot = Snapshot(dataset=dataset, version=newest + 1, digest=manifest.sha256)
            session.add(snapshot)
        else:
            profile = profile | _gone(session, snapshot, profile, {batch.image(i).rgb_digest for i in sides})
        snapshot.stage_key, snapshot.profile = key, profile
        snapshot.kept, snapshot.rejected = len(rows), len(batch.files) - len(rows)
        session.flush()
        for table, values in ((SnapshotItem, items), (VerdictRow, verdicts)):
            session.execute(delete(table).where(table.snapshot_id == snapshot.id))
            while part := [value | {"snapshot_id": snapshot.id} for value in islice(values, INSERT_ROWS)]:
                session.execute(insert(table), part)
        return datasets.SnapshotRow(snapshot.id, dataset, snapshot.version, snapshot.digest, snapshot.kept,
                                    snapshot.rejected, snapshot.created_at, profile)


def _gone(session: Session, snapshot: Snapshot, profile: Mapping[str, Any], here: Set[str]) -> dict[str, Any]:
    """For the profile of a snapshot that is made once more: the sides of its dropped duplicates that are gone since.

    Only a duplicate can go and leave the manifest the same; its row goes with it.
    """
    if snapshot.profile.get("lots") != profile["lots"]:
        return {}
    query = select(SnapshotItem.rgb_digest, SnapshotItem.split).where(
        SnapshotItem.snapshot_id == snapshot.id, SnapshotItem.split.is_not(None))
    sides = snapshot.profile.get(GONE, {}) | dict(session.execute(query).tuples().all())
    gone = {digest: side for digest, side in sides.items() if digest not in here}
    return {GONE: gone} if gone else {}


def _item_values(batch: Batch, i: int, ordinal: int, row: SampleRow | None, side: str | None) -> dict[str, Any]:
    file, facts = batch.files[i], batch.facts[i]
    item = file.item
    known = isinstance(facts, ImageFacts)
    return {
        "ordinal": ordinal, "file_name": item.file_name, "sha256": file.sha256, "caption": item.caption,
        "rgb_digest": facts.rgb_digest if known else None, "kept": row is not None,
        "split": side, "group": item.group, "component": row.component if row else None,
        "width": facts.width if known else None, "height": facts.height if known else None,
        "licence": item.licence, "author": item.author, "source": item.source}
