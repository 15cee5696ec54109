"""Every kind of adapter on the demo: seconds of CPU a step, peak memory, held-out loss as a ratio to the base's.

Each kind is trained in a process of its own, on a part of the demo's pictures with a batch of 4 and a steady learning
rate, so that all kinds take minutes.
"""

import json
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from components.training.adapters import KINDS

ROOT = Path(__file__).parents[2]
STEPS = 50
GROUPS = 40  # concepts, each in the brand's colours
COMMON = (
    f"training.max_train_steps={STEPS}",
    "training.checkpointing_steps=25",
    "training.train_batch_size=4",
    'training.lr_scheduler="constant"',
    "training.lr_warmup_steps=0",
    "training.validation_items=24",
    "training.validation_times=4",
    "training.preview_prompts=0",
    'training.targets="attention-mlp"',
)
OF_KIND: dict[str, tuple[str, ...]] = {"pissa": ("training.learning_rate=5e-4",)}  # it starts large: a smaller rate


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """One kind, trained in this process; what the kinds before it curated and cached in `folder` is found again."""
    from components.config import load_recipe
    from components.curation.snapshots import curate, curate_key, read_manifest
    from components.demo.icons import write_icons
    from components.families.bases import resolve_base
    from components.latents.caching import cache_latents
    from components.stages import Bench, ensure
    from components.training.finetune import fine_tune
    from components.workspace import Workspace
    from flows.demo import known_words

    icons = folder / "icons"
    if not icons.exists():
        write_icons(icons, known_words())
        _keep_groups(icons)
    overrides = (*COMMON, f"training.adapter={kind}", *OF_KIND.get(kind, ()))
    recipe = load_recipe(ROOT / "flows/recipes/demo.toml", overrides=overrides, data=icons)
    bench, base = Bench.open(Workspace(folder / "home")), resolve_base(recipe.base)
    bench.catalog.migrate()
    settings: dict[str, Any] = {"dataset": "icons", "training_size": 64}
    key, scanned = curate_key(bench, recipe.data, recipe.curation, **settings)
    curated = ensure(
        bench,
        "curate",
        key,
        lambda: curate(bench, recipe.data, recipe.curation, **settings, scanned=scanned, key=key),
    )
    rows = read_manifest(bench.store, curated.product.facts["digest"])
    cache_latents(bench, rows, base, 64, lambda done, total: None)
    seconds: list[float] = []

    def note(event: dict[str, Any]) -> None:
        if "loss" in event:
            seconds.append(time.process_time())

    trained = fine_tune(bench, rows, base, recipe.training, 64, folder / kind, on_event=note, should_stop=lambda: False)
    steps = sorted(later - earlier for earlier, later in pairwise(seconds))
    return {
        "adapter": kind,
        "trained_parameters": trained.facts["trained_parameters"],
        "cpu_s_per_step": round(steps[len(steps) // 2], 4),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
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


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_the_demo_in_fifty_steps(kind: str, folder: Path):
    code = "import json, sys; from pathlib import Path; from tests.benchmarks.bench_adapters import measure; " + (
        "print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, kind, str(folder)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    line = done.stdout.strip().splitlines()[-1]
    print(f"\n{line}")
    halfway, end = json.loads(line)["validation_ratio"]
    assert end < halfway < 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")
