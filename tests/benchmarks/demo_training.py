"""Fine-tunes the embedded base on a part of the demo, in a process of its own, and says what it cost.

Fifty steps with a batch of 4 and a steady learning rate, so that every setting takes about a minute. Settings share a
folder: what the first of them curated and cached is found again by the others.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from components.config import load_recipe
from components.curation.manifest import read_manifest
from components.curation.snapshots import curate, curate_key
from components.demo.icons import write_icons
from components.families.bases import resolve_base
from components.latents.caching import cache_latents
from components.latents.keys import usual_sizing
from components.stages import Bench, ensure
from components.training.finetune import fine_tune
from components.workspace import Workspace
from flows.demo import known_words
from tests.benchmarks.paired import ROOT, Run, answer, child, peak_memory_mb

GROUPS = 40  # concepts, each in the brand's colours
COMMON = (
    "training.max_train_steps=50",
    "training.checkpointing_steps=25",
    "training.train_batch_size=4",
    'training.lr_scheduler="constant"',
    "training.lr_warmup_steps=0",
    "training.validation_items=24",
    "training.validation_times=4",
    "training.preview_prompts=0",
    'training.targets="attention-mlp"',
)


def measured(folder: Path, *settings: str) -> Run:
    """What a step costs with these `training.key=value`, and the held-out loss over the base's, halfway and last."""
    run = child("tests.benchmarks.demo_training", {"folder": str(folder), "settings": settings})
    print(f"\n{', '.join(settings)}: {json.dumps(run)}")
    return run


def run(request: dict[str, Any]) -> Run:
    folder = Path(request["folder"])
    icons = folder / "icons"
    if not icons.exists():
        write_icons(icons, known_words())
        _keep_groups(icons)
    recipe = load_recipe(ROOT / "flows/recipes/demo.toml", overrides=[*COMMON, *request["settings"]], data=icons)
    bench, base = Bench.open(Workspace(folder / "home")), resolve_base(recipe.base)
    bench.catalog.migrate()
    sizes: dict[str, Any] = {"dataset": "icons", "training_size": 64}
    key, scanned = curate_key(bench, recipe.data, recipe.curation, **sizes)
    curated = ensure(
        bench,
        "curate",
        key,
        lambda: curate(bench, recipe.data, recipe.curation, **sizes, scanned=scanned, key=key),
    )
    rows = read_manifest(bench.store, curated.product.facts["digest"])
    cache_latents(bench, rows, base, usual_sizing(base, 64), lambda done, total: None)
    cpu_s: list[float] = []

    def look_on(event: dict[str, Any]) -> None:
        if "loss" in event:
            cpu_s.append(time.process_time())

    work = folder / "work"
    trained = fine_tune(bench, rows, base, recipe.training, work, on_event=look_on, should_stop=lambda: False)
    return {
        "trained_parameters": trained.facts["trained_parameters"],
        "cpu_s_per_step": round(median(later - earlier for earlier, later in pairwise(cpu_s)), 4),
        "peak_memory_mb": peak_memory_mb(),
        "validation_ratio": [round(line["validation_ratio"], 4) for line in trained.facts["validation"]],
    }


def _keep_groups(folder: Path) -> None:
    """Leave the pictures of the first concepts of each split in the table; files that it does not name are not read."""
    table = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    kept = {
        group
        for split in ("train", "test")
        for group in sorted({row["group"] for row in rows if row["split"] == split})[:GROUPS]
    }
    for row in rows:
        if row["group"] not in kept:
            (folder / row["file_name"]).unlink()
    lines = [json.dumps(row) + "\n" for row in rows if row["group"] in kept]
    table.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    answer(run)
