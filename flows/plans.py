"""`safelight plan`: what a retraining would do, read from headers, keys and the times of earlier runs."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from PIL import Image
from sqlalchemy import select

from components.catalog.models import StageResultRow
from components.config import Recipe
from components.curation.choosing import scan_captioned
from components.curation.pixels import FORMATS, MAX_PIXELS, UnreadableImage, decode
from components.curation.sources import Item, picture_file, read_picture
from components.families.bases import BaseModel, resolve_base
from components.families.tokens import caption_readers
from components.latents.buckets import Bucket
from components.latents.crops import Crop, crop_sheet
from components.latents.keys import training_buckets, training_size
from components.stages import Bench, committed
from components.storage import atomic_write
from flows.console import Reporter, number, seconds, size
from flows.keys import stage_keys

NAMED = 3  # skipped files of one reason that are named; the JSON document has all
RECENT = 5  # results of a stage whose speed tells the next one's
RUNTIME_BYTES = 1_000_000_000  # Python with torch and diffusers loaded (measured: 0.9 to 1.1 GB resident)
OPTIMIZER_BYTES = 16  # per trained parameter: weight, gradient and two moments in fp32
WORST = 20  # crops on the sheet
ORIENTATION = 0x0112  # the EXIF tag; from 5 on width and height change places
EXIF_LAST = "PNG"  # the format that may state it behind the pixels, where reading it would decode them


@dataclass(frozen=True, slots=True)
class _Placed:
    """A usable picture: how it comes to its bucket, and how many samples it is in an epoch of training."""

    item: Item
    crop: Crop
    samples: float  # its repeats; less by the share that is held out where the data names no split


def plan(bench: Bench, recipe: Recipe) -> dict[str, Any]:
    """The plan's document. Opens headers, hashes what is new and draws the worst crops into the workspace."""
    base = resolve_base(recipe.base)
    resolution = training_size(base, recipe.training)
    scanned = scan_captioned(bench, recipe.data, recipe.captions, dataset=recipe.name)
    items = [file.item for file in scanned.files]
    placed = _place(items, training_buckets(base, resolution), recipe)
    stages = _stages(bench, recipe, pictures=len(placed))
    training = recipe.training
    batches = training.gradient_accumulation_steps * training.num_processes
    seen = training.max_train_steps * training.train_batch_size * batches
    samples = sum(one.samples for one in placed)
    expected = [stage["expected_seconds"] for stage in stages]
    return {
        "name": recipe.name,
        "base": base.name,
        "resolution": resolution,
        "sources": [asdict(source) | {"skipped": source.reasons} for source in scanned.sources],
        "pictures": {"found": len(items), "usable": len(placed), "unusable": len(items) - len(placed)},
        "buckets": _buckets(placed, recipe),
        "pixels_cropped": mean(one.crop.share for one in placed) if placed else 0.0,
        "worst_crops": _worst_crops(placed, bench.workspace.home / "plans" / f"{recipe.name}-crops.png"),
        "captions": _captions(items, base),
        "steps": training.max_train_steps,
        "samples_seen": seen,
        "epochs": seen / samples if samples else math.nan,
        "stages": stages,
        "expected_seconds": None if None in expected else sum(expected),
        "memory_bytes": _memory(base, recipe),
    }


def show(reporter: Reporter, document: dict[str, Any]) -> None:
    """The plan for a person."""
    pictures = document["pictures"]
    reporter.say(f"{document['name']} on {document['base']} at {document['resolution']} px")
    reporter.say(
        f"pictures  {pictures['usable']} usable, {pictures['unusable']} not, before checks for duplicates and quality"
    )
    for source in document["sources"]:
        _show_source(reporter, source)
    reporter.table(
        ("bucket", "pictures", "samples", "batches", "steps", "cropped", "worst", "enlarged"),
        [
            (
                f"{bucket['width']}x{bucket['height']}",
                bucket["pictures"],
                number(bucket["samples"]),
                bucket["batches"],
                bucket["steps"],
                f"{bucket['cropped']['mean']:.1%}",
                f"{bucket['cropped']['worst']:.1%}",
                bucket["upscaled"],
            )
            for bucket in document["buckets"]
        ],
        right=("pictures", "samples", "batches", "steps", "cropped", "worst", "enlarged"),
    )
    reporter.say(f"cropped   {document['pixels_cropped']:.1%} of the pixels")
    if sheet := document["worst_crops"]["sheet"]:
        reporter.say(f"          the worst {len(document['worst_crops']['pictures'])}: {sheet}")
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


def _show_source(reporter: Reporter, source: dict[str, Any]) -> None:
    reporter.say(f"source    {source['path']}: {source['pictures']} pictures, {source['means']} ({source['layout']})")
    for reason, names in source["skipped"].items():
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        reporter.say(f"skipped   {shown}: {reason}")


def _place(items: Sequence[Item], sizes: tuple[Bucket, ...], recipe: Recipe) -> list[_Placed]:
    """The usable pictures, each in its bucket; only headers are read."""
    stated = any(item.split for item in items if not item.is_reg)
    placed = []
    for item in items:
        if item.problem is not None or item.path is None:
            continue
        try:
            with Image.open(picture_file(item), formats=FORMATS) as image:
                width, height = image.size
                if image.format != EXIF_LAST and image.getexif().get(ORIENTATION, 1) >= 5:
                    width, height = height, width
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        if width * height > MAX_PIXELS:
            continue
        trained = float(item.split != "test") if stated or item.is_reg else 1 - recipe.curation.test_fraction
        placed.append(_Placed(item, Crop.of(width, height, sizes), item.repeats * trained))
    return placed


def _buckets(placed: Sequence[_Placed], recipe: Recipe) -> list[dict[str, Any]]:
    """For each bucket its share of training: samples and the batches that they fill in an epoch, steps of the whole."""
    members: dict[Bucket, list[_Placed]] = {}
    for one in placed:
        members.setdefault(one.crop.bucket, []).append(one)
    training, everything = recipe.training, sum(one.samples for one in placed)
    lines = []
    for bucket, inside in sorted(members.items()):
        samples = sum(one.samples for one in inside)
        shares = [one.crop.share for one in inside]
        lines.append(
            {
                "width": bucket.width,
                "height": bucket.height,
                "pictures": len(inside),
                "repeats": sum(one.item.repeats for one in inside),
                "samples": samples,
                "batches": math.ceil(samples / training.train_batch_size),
                "steps": round(training.max_train_steps * samples / everything) if everything else 0,
                "cropped": {"mean": mean(shares), "worst": max(shares)},
                "upscaled": sum(one.crop.scale > 1 for one in inside),
            }
        )
    return lines


def _worst_crops(placed: Sequence[_Placed], path: Path) -> dict[str, Any]:
    """The pictures that lose most, and where their sheet is; a picture whose pixels cannot be read is not on it."""
    worst = sorted((one for one in placed if one.crop.share > 0), key=lambda one: (-one.crop.share, one.item.file_name))
    shown = []
    for one in worst[:WORST]:
        try:
            image = decode(read_picture(one.item))
        except (OSError, UnreadableImage):
            continue
        shown.append((image, one.crop, f"{one.crop.share:.0%}: {one.item.file_name}"))
    if shown:
        data = io.BytesIO()
        crop_sheet(shown).save(data, "PNG")
        with atomic_write(path) as file:
            file.write(data.getvalue())
    return {
        "sheet": str(path) if shown else None,
        "pictures": [
            {
                "file_name": one.item.file_name,
                "width": one.crop.width,
                "height": one.crop.height,
                "bucket": f"{one.crop.bucket.width}x{one.crop.bucket.height}",
                "cropped": one.crop.share,
            }
            for one in worst[:WORST]
        ],
    }


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


def _stages(bench: Bench, recipe: Recipe, *, pictures: int) -> list[dict[str, Any]]:
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
    for name, key in stage_keys(bench, recipe):
        reused = None if key is None else committed(bench, key) is not None
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
