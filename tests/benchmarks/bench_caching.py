"""What the latent cache saves: cold, warm, and with 1 % of the pictures changed, in CPU seconds of one process.

Each figure is the median ratio of paired runs (cold / other) on the embedded base; the first pair is dropped.
"""

import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from components.config import BaseModelConfig, load_recipe
from components.curation.manifest import read_manifest
from components.curation.snapshots import curate, curate_key
from components.families.bases import resolve_base
from components.latents.caching import cache_latents
from components.stages import Bench
from components.workspace import Workspace

PICTURES = 400
PAIRS = 5


def write_noise(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as table:
        for index in range(PICTURES):
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
            table.write(json.dumps({"file_name": f"{index}.png", "text": f"noise {index}"}) + "\n")


def cpu_seconds(bench: Bench, recipe_path: Path) -> tuple[float, int]:
    """CPU seconds of curating and caching, and how many pictures were encoded."""
    recipe, base = load_recipe(recipe_path), resolve_base(BaseModelConfig())
    started = time.process_time()
    key, scanned = curate_key(bench, recipe.data, recipe.curation, dataset=recipe.name, training_size=64)
    product = curate(
        bench, recipe.data, recipe.curation, dataset=recipe.name, training_size=64, scanned=scanned, key=key
    )
    rows = read_manifest(bench.store, product.facts["digest"])
    cached = cache_latents(bench, rows, base, 64, lambda done, total: None)
    return time.process_time() - started, cached.facts["encoded_images"]


def test_how_much_cheaper_a_warm_cache_is(tmp_path: Path):
    pictures = tmp_path / "pictures"
    write_noise(pictures)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "noise"\n[[data.sources]]\npath = "pictures"\n')
    ratios: dict[str, list[float]] = {"unchanged": [], "1 % changed": []}
    for pair in range(PAIRS + 1):
        bench = Bench.open(Workspace(tmp_path / f"home-{pair}"))
        bench.catalog.migrate()
        cold, encoded = cpu_seconds(bench, recipe)
        warm, nothing = cpu_seconds(bench, recipe)
        for index in range(PICTURES // 100):
            image = Image.open(pictures / f"{index}.png").convert("RGB")
            image.putpixel((pair, 0), (pair, 1, 2))
            image.save(pictures / f"{index}.png")
        changed, few = cpu_seconds(bench, recipe)
        assert (encoded, nothing, few) == (PICTURES, 0, PICTURES // 100)
        if pair:
            ratios["unchanged"].append(cold / warm)
            ratios["1 % changed"].append(cold / changed)
    for name, values in ratios.items():
        print(
            f"{name}: cold / warm = {np.median(values):.1f} (of {PAIRS} pairs, {min(values):.1f} to {max(values):.1f})"
        )
