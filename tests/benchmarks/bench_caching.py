"""What the latent cache costs and saves beside `datasets.map` with the same VAE: cold, warm, and with 1 % changed.

`docs/benchmarks.md` has the method and the figures. Each passage is a fork of a process that has only imported; every
run is a line of `build/bench/caching/*/raw.jsonl`, and what is there is not run again. BENCH_ROUNDS is how often each
arm is run besides the warm-up, BENCH_PICTURES how many pictures there are.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from tests.benchmarks.cache_encoding import passage
from tests.benchmarks.paired import ROOT, Ratio, Run, busy, median_ratio, ratios, run_rounds
from tests.curation.folders import settle

SOURCE_SIDE = 512  # pixels of a JPEG
ARMS = ("ours", "theirs")
ENOUGH = 3  # rounds, to hold a ratio against what it should be
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
PICTURES = int(os.environ.get("BENCH_PICTURES", "1000"))
CHANGED = max(1, PICTURES // 100)
WARM_PASSAGES = 5  # of which the median counts: ours takes a tenth of a second, and one alone says little
TOLERANCE = 1e-3  # between latents, of which the largest are about 4; both are stored in float16
WHOLE = ("find", "captions", "encode")  # of a passage; theirs has no captions
AT_LEAST = {  # theirs over ours, each in one process with all cores: what is compared, in which time, how often
    "cold": (("encode",), "wall_s", 1.2),  # both compute the same; ours decodes meanwhile
    "warm": (WHOLE, "cpu_s", 5.0),
    "changed": (WHOLE, "cpu_s", 20.0),
}


def write_pictures(folder: Path) -> None:
    """JPEGs with the size and the detail of photographs: clouds of several scales under a little noise."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as table:
        for index in range(PICTURES):
            cloud(index).save(folder / f"{index:04d}.jpg", quality=92)
            table.write(json.dumps({"file_name": f"{index:04d}.jpg", "text": "a cloud"}) + "\n")


def cloud(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    whole = np.roll(grain(), seed * 7919, axis=0).copy()
    for cells in (4, 16, 64):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        whole += np.asarray(coarse.resize((SOURCE_SIDE, SOURCE_SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 3
    return Image.fromarray(np.clip(whole, 0, 255).astype(np.uint8))


@cache
def grain() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 4, (SOURCE_SIDE, SOURCE_SIDE, 3)).astype(np.float32)


def passages(folder: Path, side: str, size: int, processes: int) -> Run:
    """Cold, warm and with some pictures changed, on a copy of the pictures; with what they took."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        shutil.copytree(folder / "pictures", work / "pictures")
        settle()
        (work / "home").mkdir()
        recipe = work / "recipe.toml"
        recipe.write_text('name = "clouds"\n[[data.sources]]\npath = "pictures"\n[curation]\nnear_duplicates = false\n')
        request = {
            "side": side, "size": size, "processes": processes, "recipe": str(recipe),
            "pictures": str(work / "pictures"), "home": str(work / "home"),
        }  # fmt: skip
        found: Run = {}
        for name in AT_LEAST:
            if name == "changed":
                for index in range(CHANGED):
                    cloud(PICTURES + index).save(work / "pictures" / f"{index:04d}.jpg", quality=92)
            latents = folder / f"{side}-{size}-{name}.safetensors"
            runs = [passage(request | {"latents": str(latents)}) for _ in range(WARM_PASSAGES if name == "warm" else 1)]
            found |= {f"{name}_{fact}": median(run[fact] for run in runs) for fact in runs[0]}
        return found


def distance(folder: Path, size: int) -> float:
    """The largest difference of a number of our latents and theirs."""
    pairs = [
        (
            load_file(folder / f"ours-{size}-{name}.safetensors"),
            load_file(folder / f"theirs-{size}-{name}.safetensors"),
        )
        for name in AT_LEAST
    ]
    return max(
        float(np.abs(ours[part].astype(np.float32) - theirs[part].astype(np.float32)).max())
        for ours, theirs in pairs
        for part in ours
    )


@pytest.mark.parametrize(("size", "processes"), [(128, 1), (128, 2)])
def test_the_cache_beside_datasets_map(size: int, processes: int):
    folder = ROOT / "build" / "bench" / "caching" / f"{PICTURES}"
    if not (folder / "pictures").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_pictures(folder / "pictures")
    comparison = f"{size} px, {processes} processes"
    runs = run_rounds(
        folder / "raw.jsonl", comparison, ARMS, ROUNDS, lambda arm: passages(folder, arm, size, processes)
    )
    print(f"\n{comparison}: {PICTURES} pictures, {busy(runs)} of {ROUNDS} rounds on a busy machine")
    for name in AT_LEAST:
        encoded = {run["arm"]: run[f"{name}_encoded"] for run in runs}
        print(f"  {name}: encoded {encoded}")
        for part in ("find", "captions", "encode"):
            spent = {arm: [run.get(f"{name}_{part}_cpu_s", 0.0) for run in runs if run["arm"] == arm] for arm in ARMS}
            print(f"    {part}, CPU s: {spent}")
        for some, time in ((("encode",), "cpu_s"), (("encode",), "wall_s"), (WHOLE, "cpu_s"), (WHOLE, "wall_s")):
            print(f"    {'+'.join(some)} {time}, theirs / ours: {ratio(runs, name, some, time)}")
    apart = distance(folder, size)
    print(f"  latents differ by {apart:.2g}")
    assert apart <= TOLERANCE
    if processes == 1 and ROUNDS >= ENOUGH:
        for name, (parts, clock, least) in AT_LEAST.items():
            assert ratio(runs, name, parts, clock).value >= least, name


def ratio(runs: list[Run], name: str, parts: Sequence[str], clock: str) -> Ratio:
    """Theirs over ours, of the sum of some parts of a passage."""
    summed = [run | {"sum": sum(run.get(f"{name}_{part}_{clock}", 0.0) for part in parts)} for run in runs]
    return median_ratio(ratios(summed, "sum", "theirs", "ours"))
