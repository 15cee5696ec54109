"""`safelight plan`: what a retraining would do, read from headers, keys and the times of earlier runs."""

import math
from collections import Counter
from statistics import median
from typing import Any

from PIL import Image
from sqlalchemy import select

from components.catalog.models import StageResultRow
from components.config import Recipe
from components.curation.pixels import FORMATS, MAX_PIXELS
from components.curation.sources import Item, read_sources
from components.families.bases import BaseModel, resolve_base
from components.latents.buckets import Bucket, assign, cropped_share
from components.latents.keys import training_buckets, training_size
from components.stages import Bench, committed
from flows.console import Reporter, number, seconds, size
from flows.keys import stage_keys

RECENT = 5  # results of a stage whose speed tells the next one's
RUNTIME_BYTES = 1_000_000_000  # Python with torch and diffusers loaded (measured: 0.9 to 1.1 GB resident)
OPTIMIZER_BYTES = 16  # per trained parameter: weight, gradient and two moments in fp32


def plan(bench: Bench, recipe: Recipe) -> dict[str, Any]:
    """The plan's document. Opens headers and hashes what is new; writes nothing but what it learnt of files."""
    base = resolve_base(recipe.base)
    resolution = training_size(base, recipe.training)
    items = read_sources(recipe.data)
    buckets = training_buckets(base, resolution)
    placed = _place(items, buckets)
    per_bucket = Counter(bucket for bucket, _ in placed)
    stages = _stages(bench, recipe, pictures=len(placed))
    training = recipe.training
    batches = training.gradient_accumulation_steps * training.num_processes
    samples = training.max_train_steps * training.train_batch_size * batches
    expected = [stage["expected_seconds"] for stage in stages]
    return {
        "name": recipe.name,
        "base": base.name,
        "resolution": resolution,
        "pictures": {"found": len(items), "usable": len(placed), "unusable": len(items) - len(placed)},
        "buckets": [
            {"width": bucket.width, "height": bucket.height, "pictures": count}
            for bucket, count in sorted(per_bucket.items())
        ],
        "pixels_cropped": sum(share for _, share in placed) / len(placed) if placed else 0.0,
        "steps": training.max_train_steps,
        "samples_seen": samples,
        "epochs": samples / (len(placed) * (1 - _held_out(items, recipe))) if placed else math.nan,
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
    for bucket in document["buckets"]:
        reporter.say(f"bucket    {bucket['width']}x{bucket['height']}: {bucket['pictures']} pictures")
    reporter.say(f"cropped   {document['pixels_cropped']:.1%} of the pixels")
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


def _place(items: list[Item], buckets: tuple[Bucket, ...]) -> list[tuple[Bucket, float]]:
    """Each usable picture's bucket, and the share of its area that is cropped; only headers are read."""
    placed = []
    for item in items:
        if item.problem is not None or item.path is None:
            continue
        try:
            with Image.open(item.path, formats=FORMATS) as image:
                width, height = image.size
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        if width * height > MAX_PIXELS:
            continue
        bucket = assign(width, height, buckets)
        placed.append((bucket, cropped_share(width, height, bucket)))
    return placed


def _held_out(items: list[Item], recipe: Recipe) -> float:
    stated = [item.split for item in items if item.split]
    return stated.count("test") / len(items) if stated else recipe.curation.test_fraction


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
