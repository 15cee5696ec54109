"""Snapshots: from sources to an immutable, versioned manifest, with a verdict on whatever was flagged or left out."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy import delete, func, insert, select

from components.catalog import datasets
from components.catalog.models import ExaminedImage, Snapshot, SnapshotItem
from components.catalog.models import Verdict as VerdictRow
from components.config import CurationConfig, DataConfig
from components.curation.checks import (
    EXAMINE_VERSION,
    CheckRules,
    ImageFacts,
    Profile,
    Unreadable,
    Verdict,
    check_rules,
    examine,
    judge,
    judge_captions,
    judge_licence,
    judge_set,
    profile_of,
)
from components.curation.duplicates import duplicate_groups, near_duplicates
from components.curation.masks import mask_png, read_mask, require_use
from components.curation.memory import remembering
from components.curation.pixels import decode
from components.curation.sources import FileDigest, Item, Problem, SourceReading, hash_files, read_data, read_picture
from components.curation.splits import Member, Pair, assign_splits, component_name, join_components, prove_disjoint
from components.errors import BadInput, DamagedArtifact
from components.stages import Bench, Product, canonical_json, stage_key
from components.storage import ObjectRef, Store

MAX_FILE_BYTES = 512 << 20  # a larger picture file is refused unread
SAME_DRAWING = 0.98  # correlation of two 16 x 16 copies: recoded and rescaled drawings reach 0.99
DRAWING_SIDE = 16
CHUNK = 64  # images examined per commit: what a kill can cost
WRITERS = 8  # a write waits for the disk, so several wait together
INSERT_ROWS = 1000

Facts = ImageFacts | Unreadable
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """An item of a source and what its bytes are."""

    item: Item
    sha256: str | None  # None: must not be opened, or cannot be
    bytes: int
    mask_sha256: str | None = None  # of the file that holds its mask


@dataclass(frozen=True, slots=True)
class Scan:
    """What the sources hold now, sorted by file name."""

    files: tuple[ScannedFile, ...]
    hashed: int  # files whose bytes were read; the others are as the catalog knows them
    sources: tuple[SourceReading, ...] = ()  # what is said of each source

    @property
    def digest(self) -> str:
        """Names the content: files, captions and provenance, but neither the folder's place nor times."""
        rows = [[file.sha256, *(getattr(file.item, name) for name in _DIGESTED),
                 asdict(file.item.problem) if file.item.problem else None,
                 *([file.mask_sha256] if file.mask_sha256 else []),
                 *([list(file.item.variants)] if file.item.variants else []),
                 *(["is_reg"] if file.item.is_reg else [])] for file in self.files]
        return hashlib.sha256(canonical_json(rows)).hexdigest()


_OWN_WAY = ("path", "problem", "mask", "variants", "member", "is_reg")  # fields that the digest knows otherwise
_DIGESTED = tuple(field.name for field in fields(Item) if field.name not in _OWN_WAY)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A kept sample, as the manifest lists it."""

    sha256: str
    rgb_digest: str
    file_name: str
    text: str
    group: str | None
    component: str
    split: str
    width: int
    height: int
    licence: str | None
    author: str | None
    source: str | None
    repeats: int
    mask: str | None = None  # sha256 of a grey PNG of the picture's size
    variants: tuple[str, ...] = ()  # captions besides `text`
    is_reg: bool = False  # a picture of the class, for prior preservation


MANIFEST_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("sha256", "rgb_digest", "file_name", "text")]
    + [pa.field("group", pa.string())]
    + [pa.field(name, pa.string(), nullable=False) for name in ("component", "split")]
    + [pa.field(name, pa.int32(), nullable=False) for name in ("width", "height")]
    + [pa.field(name, pa.string()) for name in ("licence", "author", "source")]
    + [pa.field("repeats", pa.int32(), nullable=False)]
)
OPTIONAL_FIELDS = (  # only in the manifest of a set where a row has one
    pa.field("mask", pa.string()),
    pa.field("variants", pa.list_(pa.string())),
    pa.field("is_reg", pa.bool_()),
)
SKIPPED_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("source", "file_name", "reason")])
VERDICT_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("file_name", "check", "decision")]
    + [pa.field("sha256", pa.string()), pa.field("score", pa.float64()), pa.field("threshold", pa.float64())]
    + [pa.field("reason", pa.string(), nullable=False)]
)


def scan(bench: Bench, data: DataConfig, *, verify: bool = False) -> Scan:
    """Read the sources' files and captions; unchanged files are not hashed again unless `verify`.

    Raises BadInput for sources that are missing, empty, without pictures or without captions.
    """
    reading = read_data(data, remembering(bench.catalog, verify=verify))
    alone = {path: None for item in reading.items for path in _files_of(item)}
    digests = hash_files(bench.catalog, list(alone), verify=verify)
    files = [_scanned(item, [digests[path] for path in _files_of(item)]) for item in reading.items]
    return Scan(tuple(files), sum(found.hashed for found in digests.values()), reading.sources)


def _files_of(item: Item) -> list[Path]:
    """The files whose bytes are the item's: its picture, unless a larger file holds it, and the file of its mask."""
    return [path for path in (item.path, item.mask) if path is not None and item.member is None]


def _scanned(item: Item, digests: Sequence[FileDigest]) -> ScannedFile:
    if item.member is not None:
        sha256 = item.member.sha256
        return ScannedFile(item, sha256, item.member.bytes, sha256 if item.mask is not None else None)
    problem = next((found.problem for found in digests if found.problem), None)
    picture = digests[0] if item.path is not None else None
    mask = digests[1].sha256 if item.mask is not None else None
    sha256, size = (picture.sha256, picture.bytes) if picture else (None, 0)
    return ScannedFile(replace(item, problem=item.problem or problem), sha256, size, mask)


def curate_key(bench: Bench, data: DataConfig, curation: CurationConfig, *, dataset: str, training_size: int,
               tokenizer: str = "", verify: bool = False) -> tuple[str, Scan]:
    """The stage key of curating these sources as they are now, and the scan behind it.

    `tokenizer` is any text that identifies what counts the captions' tokens.
    """
    found = scan(bench, data, verify=verify)
    config = curation.settings() | {
        "dataset": dataset, "training_size": training_size, "tokenizer": tokenizer, "examine": EXAMINE_VERSION}
    return stage_key("curate", inputs={"sources": found.digest}, config=config), found


def curate(bench: Bench, data: DataConfig, curation: CurationConfig, *, dataset: str, training_size: int,
           count_tokens: Callable[[str], int] | None = None, on_progress: OnProgress = lambda done, total: None,
           scanned: Scan | None = None, key: str = "") -> Product:
    """Check, deduplicate and split the sources' pictures; store what is readable and write down every verdict.

    The manifest's bytes depend on the files, the configuration and the dataset's earlier splits alone. `facts` says how
    many images were really decoded. Raises BadInput when nothing is left, when `strict` meets a reject, and when the
    data itself asks for a duplicate or a group to be on both sides of the split.
    """
    found = scanned or scan(bench, data)
    examined, decoded = _examine(bench, found.files, on_progress)
    files, masks = _read_masks(bench.store, found.files, examined)
    batch = _Batch(files, [examined.get(file.sha256) if file.sha256 else None for file in files])
    profile = profile_of([facts for facts in batch.facts if isinstance(facts, ImageFacts)])
    batch.judge(check_rules(curation, training_size, count_tokens=count_tokens, profile=profile))

    usable = batch.kept  # fit for training; duplicates among them still hold components together
    pairs = _near_pairs(bench.store, batch, usable, curation, profile)
    members = [_member(batch, i) for i in usable]
    components = join_components(members, pairs)
    splits = assign_splits(members, components, test_fraction=curation.test_fraction, salt=curation.split_salt,
                           earlier=_earlier_splits(bench, dataset, curation))
    batch.drop_exact_duplicates()
    if curation.near_duplicates:
        batch.drop_near_duplicates([(usable[i], usable[j]) for i, j in pairs])
    if not batch.kept:
        raise BadInput(f"no picture is left of {len(found.files)}: {batch.why_rejected()}; mend the data or the limits")
    if curation.strict and (first := batch.first_reject()):
        raise BadInput(f"{first}; mend or remove the file, or set curation.strict=false")
    _prove_disjoint(bench.store, batch, dict(zip(usable, splits, strict=True)), curation, profile)

    names = _component_names(members, components)
    rows = sorted((_sample_row(batch, i, name, side, masks) for i, name, side in zip(usable, names, splits, strict=True)
                   if not batch.rejected(i)), key=lambda row: (row.split, row.file_name, row.sha256))
    schema = MANIFEST_SCHEMA
    for optional in OPTIONAL_FIELDS:
        schema = schema.append(optional) if any(getattr(row, optional.name) for row in rows) else schema
    manifest = bench.store.put(_parquet([asdict(row) for row in rows], schema))
    verdicts = bench.store.put(_parquet(batch.verdict_rows(), VERDICT_SCHEMA))
    profile_facts = _describe(batch, rows, curation, profile) | _describe_sources(found.sources)
    skipped = [asdict(one) | {"source": source.path} for source in found.sources for one in source.skipped]
    listed = {"skipped": bench.store.put(_parquet(skipped, SKIPPED_SCHEMA))} if skipped else {}
    snapshot = _record(bench, batch, rows, manifest, dataset=dataset, key=key, profile=profile_facts)
    facts = profile_facts | {
        "dataset": dataset, "version": snapshot.version, "digest": manifest.sha256, "snapshot_id": snapshot.id,
        "kept": snapshot.kept, "rejected": snapshot.rejected, "train": profile_facts["splits"].get("train", 0),
        "test": profile_facts["splits"].get("test", 0), "examined": decoded, "hashed": found.hashed}
    return Product({"manifest": manifest, "verdicts": verdicts, **listed}, facts, items=len(found.files))


def read_manifest(store: Store, digest: str) -> list[SampleRow]:
    """The samples of a snapshot, sorted by (split, file name, sha256). Raises DamagedArtifact."""
    table = pq.read_table(pa.BufferReader(store.read(digest)))
    return [SampleRow(**row | {"variants": tuple(row.get("variants") or ())}) for row in table.to_pylist()]


# examining ----------------------------------------------------------------------------------------------------------


def _examine(bench: Bench, files: Sequence[ScannedFile], on_progress: OnProgress) -> tuple[dict[str, Facts], int]:
    """What one decode of each distinct file tells, from the catalog where it is known; bytes go into the store.

    Commits every CHUNK images, so that a kill costs no more than these. Returns the facts by sha256, and how many
    images were decoded.
    """
    distinct = {file.sha256: file for file in files if file.sha256 is not None}
    facts = _known_facts(bench, list(distinct))
    todo = [file for sha256, file in distinct.items() if not _is_done(bench.store, facts.get(sha256), file)]
    done, decoded, fresh = len(distinct) - len(todo), 0, {}
    on_progress(done, len(distinct))
    with ThreadPoolExecutor(WRITERS) as pool:
        for start in range(0, len(todo), CHUNK):
            chunk, writes = todo[start : start + CHUNK], []
            for file in chunk:
                known = facts.get(str(file.sha256))
                data = _read(file)
                if known is None:
                    known = fresh[str(file.sha256)] = examine(data) if data is not None else _too_large(file)
                    decoded += 1
                if isinstance(known, ImageFacts) and data is not None:
                    writes.append(pool.submit(bench.store.put, data))
            for write in writes:
                write.result()
            _remember(bench, fresh)
            facts |= fresh
            done, fresh = done + len(chunk), {}
            on_progress(done, len(distinct))
    return facts, decoded


def _read_masks(store: Store, files: Sequence[ScannedFile],
                examined: Mapping[str, Facts]) -> tuple[list[ScannedFile], dict[str, str]]:
    """The files, those whose mask cannot be used with that problem, and the stored mask's sha256 by file name."""
    problems, masks = {}, {}
    for file in files:
        facts, item = examined.get(str(file.sha256)), file.item
        if item.mask is None or item.problem is not None or not isinstance(facts, ImageFacts):
            continue
        try:
            alpha = item.mask == item.path
            mask = read_mask(read_picture(item) if alpha else item.mask.read_bytes(), alpha=alpha)
            require_use(mask, facts.width, facts.height)
            masks[item.file_name] = store.put(mask_png(mask)).sha256
        except BadInput as error:
            problems[item.file_name] = Problem("mask", f"{item.mask.name}: {error}")
    return [
        replace(file, item=replace(file.item, problem=problems.get(file.item.file_name, file.item.problem)))
        for file in files
    ], masks


def _is_done(store: Store, known: Facts | None, file: ScannedFile) -> bool:
    if isinstance(known, ImageFacts):
        return store.keep(ObjectRef(str(file.sha256), file.bytes))
    return known is not None


def _read(file: ScannedFile) -> bytes | None:
    """The bytes that were scanned, or None where they are too many. Raises DamagedArtifact if they have changed."""
    path = Path(str(file.item.path))
    if file.bytes > MAX_FILE_BYTES:
        return None
    try:
        data = read_picture(file.item)
    except OSError as error:
        raise DamagedArtifact(f"{path}: {error.strerror} since it was scanned; run the same command again") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamagedArtifact(f"{path}: changed while it was being read; run the same command again")
    return data


def _too_large(file: ScannedFile) -> Unreadable:
    return Unreadable(f"the file has {file.bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def _known_facts(bench: Bench, digests: Sequence[str]) -> dict[str, Facts]:
    known: dict[str, Facts] = {}
    with bench.catalog.read() as session:
        for start in range(0, len(digests), INSERT_ROWS):
            query = select(ExaminedImage).where(ExaminedImage.version == EXAMINE_VERSION,
                                                ExaminedImage.sha256.in_(digests[start : start + INSERT_ROWS]))
            known |= {row.sha256: _facts_from_json(row.facts) for row in session.scalars(query)}
    return known


def _remember(bench: Bench, fresh: Mapping[str, Facts]) -> None:
    if not fresh:
        return
    with bench.catalog.write() as session:
        session.execute(delete(ExaminedImage).where(ExaminedImage.version == EXAMINE_VERSION,
                                                    ExaminedImage.sha256.in_(fresh)))
        session.execute(insert(ExaminedImage), [
            {"sha256": sha256, "version": EXAMINE_VERSION, "facts": asdict(facts),
             "rgb_digest": facts.rgb_digest if isinstance(facts, ImageFacts) else None}
            for sha256, facts in fresh.items()])


def _facts_from_json(body: Mapping[str, Any]) -> Facts:
    if "reason" in body:
        return Unreadable(**body)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in body.items()}
    return ImageFacts(**values)


# sifting ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Batch:
    """The scanned files with what is known and said of each; `verdicts` grows as the checks speak."""

    files: Sequence[ScannedFile]
    facts: Sequence[Facts | None]
    verdicts: list[list[Verdict]] = field(default_factory=list)
    caption_verdict: Verdict | None = None

    def rejected(self, i: int) -> bool:
        return any(verdict.decision == "reject" for verdict in self.verdicts[i])

    @property
    def kept(self) -> list[int]:
        return [i for i in range(len(self.files)) if not self.rejected(i)]

    def image(self, i: int) -> ImageFacts:
        facts = self.facts[i]
        assert isinstance(facts, ImageFacts)
        return facts

    def name(self, i: int) -> str:
        return self.files[i].item.file_name

    def judge(self, rules: CheckRules) -> None:
        """Every check on every file, then the flags that compare a file with its set."""
        self.verdicts = [_judge(file, facts, rules) for file, facts in zip(self.files, self.facts, strict=True)]
        kept = self.kept
        for i, flags in zip(kept, judge_set([self.image(i) for i in kept], rules.profile), strict=True):
            self.verdicts[i] += flags
        self.caption_verdict = judge_captions([self.files[i].item.caption for i in kept])

    def drop_exact_duplicates(self) -> None:
        """Of files with the same pixels the best stays: most bytes, then first name."""
        alike: dict[str, list[int]] = {}
        for i in self.kept:
            alike.setdefault(self.image(i).rgb_digest, []).append(i)
        for members in alike.values():
            self._keep_best(members, "exact_duplicate", "Its pixels are those of {best}, which is kept.", None)

    def drop_near_duplicates(self, pairs: Sequence[Pair]) -> None:
        """Of files that all look alike the best stays: most pixels, then most bytes, then first name."""
        kept = self.kept
        place = {i: position for position, i in enumerate(kept)}
        inside = [(place[i], place[j]) for i, j in pairs if i in place and j in place]
        for group in duplicate_groups(len(kept), _as_pairs(inside)):
            self._keep_best([kept[position] for position in group.members], "near_duplicate",
                            "It looks like {best}, which is kept (a group of {size}).", group.component_size)

    def _keep_best(self, members: Sequence[int], check: str, says: str, component_size: int | None) -> None:
        best = min(members, key=lambda i: (self.files[i].item.is_reg, -self.image(i).width * self.image(i).height,
                                           -self.files[i].bytes, self.name(i)))
        for i in members:
            if i != best:
                bits = (self.image(i).phash ^ self.image(best).phash).bit_count()
                reason = says.format(best=self.name(best), size=component_size)
                self.verdicts[i].append(Verdict(check, float(bits), None, "reject", reason))

    def first_reject(self) -> str | None:
        for i, verdicts in enumerate(self.verdicts):
            for verdict in verdicts:
                if verdict.decision == "reject":
                    return f"{self.name(i)}: {verdict.check}: {verdict.reason}"
        return None

    def why_rejected(self) -> str:
        """Counts by the first check that rejected each file."""
        counts = Counter(next(v.check for v in verdicts if v.decision == "reject")
                         for i, verdicts in enumerate(self.verdicts) if self.rejected(i))
        return ", ".join(f"{number} {check}" for check, number in counts.most_common())

    def verdict_rows(self) -> list[dict[str, Any]]:
        return [{"file_name": file.item.file_name, "sha256": file.sha256} | asdict(verdict)
                for file, verdicts in zip(self.files, self.verdicts, strict=True) for verdict in verdicts]


def _judge(file: ScannedFile, facts: Facts | None, rules: CheckRules) -> list[Verdict]:
    """Flags and rejects of one file; a problem with the file or its caption speaks before the checks."""
    verdicts = []
    if problem := file.item.problem:
        verdicts.append(Verdict(problem.check, None, None, "reject", problem.reason))
    if facts is not None:
        verdicts += [verdict for verdict in judge(facts, file.item.caption, rules) if verdict.decision != "keep"
                     and not (problem and verdict.check.startswith("caption"))]
    if (unlicensed := judge_licence(file.item.licence, rules)) is not None:
        verdicts.append(unlicensed)
    if file.item.fallback:
        verdicts.append(Verdict("caption_fallback", None, None, "flag", "Its caption is its folder's class tokens."))
    return verdicts


def _near_pairs(store: Store, batch: _Batch, indices: Sequence[int], curation: CurationConfig,
                profile: Profile) -> list[Pair]:
    """Near duplicates as positions in `indices`.

    Drawings in one style share grounds and borders, hence hashes; there a pair must also agree pixel by pixel.
    """
    facts = [batch.image(i) for i in indices]
    pairs = near_duplicates(
        [f.phash for f in facts], [f.dhash for f in facts], [f.mean_colour for f in facts],
        phash_distance=curation.phash_distance, dhash_distance=curation.dhash_distance,
        colour_distance=curation.colour_distance)
    found: list[Pair] = [(int(i), int(j)) for i, j in pairs]
    if profile == "photo":
        return found
    copies: dict[str, NDArray[np.float64]] = {}

    def copy_of(position: int) -> NDArray[np.float64]:
        digest = facts[position].rgb_digest
        if digest not in copies:
            copies[digest] = _standardised(store.read(str(batch.files[indices[position]].sha256)))
        return copies[digest]

    return [(i, j) for i, j in found if float((copy_of(i) * copy_of(j)).mean()) >= SAME_DRAWING]


def _standardised(data: bytes) -> NDArray[np.float64]:
    """A reduced brightness copy, mean 0 and deviation 1: the mean product of two is their correlation."""
    reduced = decode(data).convert("L").resize((DRAWING_SIDE, DRAWING_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(reduced, dtype=np.float64)
    return (pixels - pixels.mean()) / max(float(pixels.std()), 1e-9)


def _as_pairs(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


# splitting ----------------------------------------------------------------------------------------------------------


def _member(batch: _Batch, i: int) -> Member:
    item = batch.files[i].item
    return Member(item.file_name, batch.image(i).rgb_digest, item.group, "train" if item.is_reg else item.split)


def _earlier_splits(bench: Bench, dataset: str, curation: CurationConfig) -> dict[str, str]:
    """The sides that the dataset's latest snapshot gave under the same salt and fraction."""
    latest = datasets.latest_snapshot(bench.catalog, dataset)
    if latest is None or latest.profile.get("lots") != _lots(curation):
        return {}
    return datasets.splits_of(bench.catalog, latest.id)


def _lots(curation: CurationConfig) -> dict[str, Any]:
    return {"salt": curation.split_salt, "test_fraction": curation.test_fraction}


def _component_names(members: Sequence[Member], components: Sequence[int]) -> list[str]:
    """For each member, the name of its component."""
    inside: dict[int, list[Member]] = {}
    for member, component in zip(members, components, strict=True):
        inside.setdefault(component, []).append(member)
    names = {component: component_name(found) for component, found in inside.items()}
    return [names[component] for component in components]


def _prove_disjoint(store: Store, batch: _Batch, splits: Mapping[int, str], curation: CurationConfig,
                    profile: Profile) -> None:
    """Look for near duplicates once more, among what is kept: not one pair may cross the split."""
    kept = batch.kept
    pairs = _near_pairs(store, batch, kept, curation, profile)
    prove_disjoint([_member(batch, i) for i in kept], [splits[i] for i in kept], pairs)


# writing down -------------------------------------------------------------------------------------------------------


def _sample_row(batch: _Batch, i: int, component: str, split: str, masks: Mapping[str, str]) -> SampleRow:
    file, facts = batch.files[i], batch.image(i)
    item = file.item
    return SampleRow(
        sha256=str(file.sha256), rgb_digest=facts.rgb_digest, file_name=item.file_name, text=item.caption,
        group=item.group, component=hashlib.sha256(component.encode()).hexdigest()[:16], split=split,
        width=facts.width, height=facts.height, licence=item.licence, author=item.author, source=item.source,
        repeats=item.repeats, mask=masks.get(item.file_name), variants=item.variants,
        is_reg=item.is_reg)


def _parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """Equal rows give equal bytes: one row group per million rows, no compression library's whims, no timestamps."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="none", version="2.6",
                   row_group_size=1_000_000)
    return sink.getvalue().to_pybytes()


def _describe(batch: _Batch, rows: Sequence[SampleRow], curation: CurationConfig, profile: Profile) -> dict[str, Any]:
    """The snapshot's profile: what the dashboard and the dataset card say of the set."""
    def counts(values: Iterable[object]) -> dict[str, int]:
        return {str(value): number for value, number in Counter(values).most_common()}

    words = [len(row.text.split()) for row in rows]
    return {
        "kind": profile,
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
    }


def _describe_sources(sources: Sequence[SourceReading]) -> dict[str, Any]:
    """Which layout each source has, and how many of its files were skipped for which reason."""
    return {"sources": [
        {"path": source.path, "layout": source.layout, "pictures": source.pictures,
         "skipped": {reason: len(names) for reason, names in source.reasons.items()}} for source in sources]}


def _record(bench: Bench, batch: _Batch, rows: Sequence[SampleRow], manifest: ObjectRef, *, dataset: str, key: str,
            profile: dict[str, Any]) -> datasets.SnapshotRow:
    """Write the snapshot's rows, all or none. A manifest that the dataset had before keeps its version."""
    splits = {row.file_name: row for row in rows}
    items, verdicts = [], []
    for ordinal, i in enumerate(sorted(range(len(batch.files)), key=lambda i: (batch.rejected(i), batch.name(i)))):
        items.append(_item_values(batch, i, ordinal, splits.get(batch.name(i))))
        verdicts += [asdict(verdict) | {"ordinal": ordinal} for verdict in batch.verdicts[i]]
    with bench.catalog.write() as session:
        snapshot = session.scalar(
            select(Snapshot).where(Snapshot.dataset == dataset, Snapshot.digest == manifest.sha256))
        if snapshot is None:
            newest = session.scalar(select(func.max(Snapshot.version)).where(Snapshot.dataset == dataset)) or 0
            snapshot = Snapshot(dataset=dataset, version=newest + 1, digest=manifest.sha256)
            session.add(snapshot)
        snapshot.stage_key, snapshot.profile = key, profile
        snapshot.kept, snapshot.rejected = len(rows), len(batch.files) - len(rows)
        session.flush()
        for table, values in ((SnapshotItem, items), (VerdictRow, verdicts)):
            session.execute(delete(table).where(table.snapshot_id == snapshot.id))
            if values:
                session.execute(insert(table), [value | {"snapshot_id": snapshot.id} for value in values])
        return datasets.SnapshotRow(snapshot.id, dataset, snapshot.version, snapshot.digest, snapshot.kept,
                                    snapshot.rejected, snapshot.created_at, profile)


def _item_values(batch: _Batch, i: int, ordinal: int, row: SampleRow | None) -> dict[str, Any]:
    file, facts = batch.files[i], batch.facts[i]
    item = file.item
    known = isinstance(facts, ImageFacts)
    return {
        "ordinal": ordinal, "file_name": item.file_name, "sha256": file.sha256, "caption": item.caption,
        "rgb_digest": facts.rgb_digest if known else None, "kept": row is not None,
        "split": row.split if row else None, "group": item.group, "component": row.component if row else None,
        "width": facts.width if known else None, "height": facts.height if known else None,
        "licence": item.licence, "author": item.author, "source": item.source}
