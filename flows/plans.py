"""`safelight plan`: what a retraining would do, read from headers, keys and the times of earlier runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from sqlalchemy import select

from components.catalog.models import StageResultRow
from components.config import Recipe
from components.curation.choosing import scan_captioned
from components.curation.scanning import Scan
from components.curation.sources import Item
from components.families.bases import BaseModel, resolve_base
from components.families.tokens import caption_readers
from components.latents.keys import training_sizing
from components.stages import Bench, committed
from components.storage import ObjectRef
from flows.console import Reporter, number, scan_event, seconds, size
from flows.keys import committed_snapshot, stage_keys
from flows.placing import place_pictures

NAMED = 3  # skipped files of one reason that are named; the JSON document has all
RECENT = 5  # results of a stage whose speed tells the next one's
RUNTIME_BYTES = 1_000_000_000  # Python with torch and diffusers loaded (measured: 0.9 to 1.1 GB resident)
OPTIMIZER_BYTES = 16  # per trained parameter: weight, gradient and two moments in fp32


def plan(
    bench: Bench, recipe: Recipe, on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> dict[str, Any]:
    """The plan's document. Hashes what is new, telling how far it is, opens headers of what no curation has seen, and
    writes what each picture loses and the worst crops into the workspace."""
    base, training = resolve_base(recipe.base), recipe.training
    sizing = training_sizing(base, training)
    scanned = scan_captioned(
        bench,
        recipe.data,
        recipe.captions,
        dataset=recipe.name,
        on_progress=lambda step, done, total: on_event(scan_event(step, done, total)),
    )
    items = [file.item for file in scanned.files]
    placing = place_pictures(bench.catalog, scanned.files, recipe, sizing)
    usable = len(placing.pictures)
    stages = _stages(bench, recipe, scanned, pictures=usable)
    batches = training.gradient_accumulation_steps * training.num_processes
    seen = training.max_train_steps * training.train_batch_size * batches
    expected = [stage["expected_seconds"] for stage in stages]
    return {
        "name": recipe.name,
        "base": base.name,
        "resolution": sizing.resolution,
        "resolutions": list(sizing.resolutions),
        "crop": sizing.crop,
        "sources": [asdict(source) | {"skipped": source.reasons} for source in scanned.sources],
        "pictures": {"found": len(items), "usable": usable, "unusable": len(items) - usable},
        "copied": recipe.data.copy_pictures,
        "bytes_to_copy": _bytes_to_copy(bench, scanned, recipe.data.copy_pictures),
        "buckets": placing.buckets(),
        "pixels_cropped": placing.cropped,
        "worst_crops": placing.write(bench.workspace.home / "plans", recipe.name),
        "enlarged": placing.enlarged(),
        "smaller": placing.smaller(),
        "captions": _captions(items, base),
        "steps": training.max_train_steps,
        "samples_seen": seen,
        "epochs": seen / placing.samples if placing.samples else math.nan,
        "stages": stages,
        "expected_seconds": None if None in expected else sum(expected),
        "memory_bytes": _memory(base, recipe),
    }


def show(reporter: Reporter, document: dict[str, Any]) -> None:
    """The plan for a person."""
    pictures = document["pictures"]
    reporter.say(f"{document['name']} on {document['base']} at {_listed(document['resolutions'])} px")
    reporter.say(
        f"pictures  {pictures['usable']} usable, {pictures['unusable']} not, before checks for duplicates and quality"
    )
    for source in document["sources"]:
        _show_source(reporter, source)
    where = "" if document["copied"] else "read where they are; "
    reporter.say(f"          {where}{size(document['bytes_to_copy'])} to be copied into the workspace")
    lost = "padded" if document["crop"] == "pad" else "cropped"
    columns = ("bucket", "pictures", "samples", "batches", "steps", lost, "worst", "enlarged")
    reporter.table(
        columns,
        [
            (
                f"{bucket['width']}x{bucket['height']}",
                bucket["pictures"],
                number(bucket["samples"]),
                bucket["batches"],
                bucket["steps"],
                f"{bucket[lost]['mean']:.1%}",
                f"{bucket[lost]['worst']:.1%}",
                bucket["upscaled"],
            )
            for bucket in document["buckets"]
        ],
        right=columns[1:],
    )
    _show_crops(reporter, document)
    for reader in document["captions"]:
        if worst := reader["worst"]:
            reporter.say(
                f"captions  {reader['longer']} have more than the {reader['limit']} tokens that {reader['tokenizer']}"
                f" takes and are cut; the longest has {worst['tokens']}: {worst['file_name']}"
            )
    reporter.say(
        f"training  {document['steps']} steps, {document['samples_seen']} samples, {number(document['epochs'])} epochs"
    )
    reporter.say(f"memory    about {size(document['memory_bytes'])}\n")
    reporter.table(
        ("stage", "what happens", "expected"),
        [
            (
                stage["name"],
                {True: "reused", False: "runs", None: "depends on the stages before"}[stage["reused"]],
                "not known yet" if stage["expected_seconds"] is None else seconds(stage["expected_seconds"]),
            )
            for stage in document["stages"]
        ],
    )
    total = document["expected_seconds"]
    reporter.say(
        "\nexpected  " + (seconds(total) if total is not None else "not known before the first run on this machine")
    )


def _bytes_to_copy(bench: Bench, scanned: Scan, copied: bool) -> int:
    """Of pictures that the workspace does not hold yet; those that turn out to be unusable are counted too."""
    wanted = {
        ObjectRef(file.sha256, file.bytes)
        for file in scanned.files
        if file.sha256 and file.item.problem is None and (copied or file.item.member is not None)
    }
    return sum(ref.bytes for ref in wanted if not bench.store.holds(ref))


def _show_crops(reporter: Reporter, document: dict[str, Any]) -> None:
    """What is lost on the way to the buckets, and what a plan by buckets makes of pictures."""
    crops, enlarged, lines = document["worst_crops"], document["enlarged"], document["buckets"]
    reporter.say(
        f"cropped   {document['pixels_cropped']:.1%} of the pixels"
        + (f"; each picture's loss: {crops['table']}" if crops["table"] else "")
    )
    if crops["sheet"]:
        reporter.say(f"          the worst {len(crops['pictures'])}: {crops['sheet']}")
    for resolution, count in document["smaller"].items():
        reporter.say(f"smaller   {count} are too small for {resolution} px and take a smaller bucket, not enlarged")
    if enlarged["pictures"]:
        most = enlarged["worst"][0]
        reporter.say(f"enlarged  {enlarged['pictures']}, most {most['file_name']}, {most['scale']:.2f} times")
    if few := [line for line in lines if line["repeated"]]:
        reporter.say(
            f"repeated  {len(few)} of {len(lines)} buckets have fewer samples than a batch: their"
            f" {sum(line['pictures'] for line in few)} pictures come more than once in one"
        )
    if unseen := sum(line["unseen"] for line in lines):
        reporter.say(f"unseen    {unseen} samples, since training ends before its first epoch does")


def _listed(sizes: list[int]) -> str:
    return " and ".join(filter(None, (", ".join(map(str, sizes[:-1])), str(sizes[-1]))))


def _show_source(reporter: Reporter, source: dict[str, Any]) -> None:
    reporter.say(f"source    {source['path']}: {source['pictures']} pictures, {source['means']} ({source['layout']})")
    for reason, names in source["skipped"].items():
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        reporter.say(f"skipped   {shown}: {reason}")


def _captions(items: Sequence[Item], base: BaseModel) -> list[dict[str, Any]]:
    """For each of the base's tokenizers, how many captions are longer than it takes, and the longest of them."""
    files: dict[str, str] = {}
    for item in items:
        for text in (item.caption, *item.variants) if item.problem is None else ():
            files.setdefault(text, item.file_name)
    texts = list(files)
    lines = []
    for reader in caption_readers(base):
        limit = reader.limit
        counts = reader.count(texts) if limit is not None else []
        longer = [(count, text) for count, text in zip(counts, texts, strict=bool(counts)) if count > (limit or 0)]
        worst = max(longer, default=None)
        lines.append(
            {
                "tokenizer": reader.name,
                "limit": limit,
                "longer": len(longer),
                "worst": worst and {"tokens": worst[0], "file_name": files[worst[1]], "caption": worst[1]},
            }
        )
    return lines


def _stages(bench: Bench, recipe: Recipe, scanned: Scan, *, pictures: int) -> list[dict[str, Any]]:
    evaluation = recipe.evaluation
    work = {
        "curate": pictures,
        "cache": pictures,
        "fine-tune": recipe.training.max_train_steps,
        "register": 1,
        "evaluate": evaluation.prompts * evaluation.seeds_per_prompt
        + evaluation.variety_prompts * evaluation.variety_seeds,
    }
    stages, unknown = [], False
    for name, key in stage_keys(bench, recipe, scanned):
        found = committed_snapshot(bench, recipe, key) if name == "curate" and key else key and committed(bench, key)
        reused = None if key is None else found is not None
        unknown = unknown or not reused
        pace = _pace(bench, name)
        cost = 0.0 if reused else None if pace is None else pace * work[name]
        stages.append({"name": name, "key": key, "reused": reused, "expected_seconds": cost})
    return stages


def _pace(bench: Bench, stage: str) -> float | None:
    """Seconds per item of the stage's newest results on this machine, or None when there are none."""
    newest = (
        select(StageResultRow.seconds, StageResultRow.items)
        .where(StageResultRow.stage == stage, StageResultRow.items > 0)
        .order_by(StageResultRow.created_at.desc())
        .limit(RECENT)
    )
    with bench.catalog.read() as session:
        paces = [took / items for took, items in session.execute(newest)]
    return median(paces) if paces else None


def _memory(base: BaseModel, recipe: Recipe) -> int:
    """Runtime, the denoiser's weights, and what the optimizer holds of an adapter of this rank (about)."""
    files = list((base.path / base.architecture.denoiser_part).glob("*.safetensors"))
    weights = sum(file.stat().st_size for file in files)
    return RUNTIME_BYTES + 2 * weights + OPTIMIZER_BYTES * recipe.training.rank * weights // 2000
