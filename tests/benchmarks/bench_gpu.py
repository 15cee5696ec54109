"""Fine-tuning on a GPU: steps and pictures a second, MFU, HFU and peak memory, eager, compiled and as CUDA graphs.

The fine-tune stage itself is run, on cached latents of random numbers and a denoiser with random weights in the real
dimensions of SD 1.5 at 512 px and SDXL at 1024 px. Each arm is a process of its own, and arms are run in turns.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from components.config import TrainingConfig
from components.curation.manifest import SampleRow
from components.families.bases import BaseModel
from components.latents.encoding import encode_missing
from components.latents.keys import (
    NULL_PROMPT,
    caption_item,
    pixel_encoder_key,
    placements,
    prompt_encoder_key,
    sample_item,
    usual_sizing,
)
from components.stages import Bench
from components.tensors import default_device
from components.training.finetune import fine_tune
from components.workspace import Workspace
from tests.benchmarks.geometry import GEOMETRIES, SD15, Geometry, step_flops

ROOT = Path(__file__).parents[2]
PICTURES = 64
WARM_UP, TIMED, REPEATS = 20, 100, 3
CONFIG = {"rank": 16, "targets": "attention", "validation_items": 1, "preview_prompts": 0}
ARMS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "graphs": {"cuda_graphs": True},
    "compiled graphs": {"compile": True, "cuda_graphs": True},
    "checkpointed": {"gradient_checkpointing": True},
    "fp8": {"base_precision": "fp8"},
    "nf4": {"base_precision": "nf4"},
}
BATCHES = {"sd15": (1, 16), "sdxl": (1, 4)}
TINY = replace(  # to run all of this on a CPU, in seconds
    SD15, side=128, config=SD15.config | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
)
KNOWN = GEOMETRIES | {"tiny": TINY}
PEAKS = {  # FLOP/s in bf16, dense, of data sheets; by a part of the device's name
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_of(device_name: str) -> float | None:
    """The first entry that the name holds as words of its own; None for a device that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", device_name)), None)


def write_base(geometry: Geometry, folder: Path) -> BaseModel:
    """A base as far as training reads it: the denoiser with random weights, and the configs of the other parts."""
    family = geometry.family
    if not folder.exists():
        torch.manual_seed(0)
        denoiser: Any = geometry.empty().to(torch.bfloat16).to_empty(device=default_device())
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        denoiser.save_pretrained(folder / family.denoiser_part)
        levels = geometry.downscale.bit_length()
        for part, config in {
            "vae/config.json": {
                "block_out_channels": [8] * levels,
                "latent_channels": geometry.channels,
                "scaling_factor": 0.18215,
            },
            "scheduler/scheduler_config.json": {
                "_class_name": "DDIMScheduler",
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "num_train_timesteps": 1000,
            },
            "model_index.json": {"_class_name": geometry.pipeline},
        }.items():
            (folder / part).parent.mkdir(exist_ok=True)
            (folder / part).write_text(json.dumps(config), encoding="utf-8")
    return BaseModel("random", None, geometry.pipeline, folder, {part: part for part in family.parts})


def cache_noise(bench: Bench, base: BaseModel, geometry: Geometry) -> list[SampleRow]:
    """Random latents and embeddings in the latent cache, under the keys of pictures that nobody has."""
    side, cells = geometry.side, geometry.side // geometry.downscale
    rows = [
        SampleRow(*(f"{i:064x}",) * 2, f"{i}.png", f"noise {i}", None, str(i), "train", side, side, *(None,) * 3, 1)
        for i in range(PICTURES)
    ]
    latent, stored = (geometry.channels, cells, cells), getattr(torch, base.architecture.precision)

    def pictures(batch: Sequence[Any]) -> dict[str, torch.Tensor]:
        return {name: torch.randn(len(batch), *latent).to(torch.float16) for name in ("mean", "logvar")}

    def captions(batch: Sequence[Any]) -> dict[str, torch.Tensor]:
        shapes = {name: shape for name, shape in geometry.cond.items() if name != "time_ids"}
        return {name: torch.randn(len(batch), *shape).to(stored) for name, shape in shapes.items()}

    items = [sample_item(row, *placements(row, usual_sizing(base, side))) for row in rows]
    encode_missing(bench, pixel_encoder_key(base), items, pictures, lambda count: None)
    texts = [caption_item(text) for text in (*(row.text for row in rows), NULL_PROMPT)]
    encode_missing(bench, prompt_encoder_key(base), texts, captions, lambda count: None)
    return rows


class Clock:
    """Times between the steps that a training reports, by the GPU's own events, and its peak memory when warm."""

    def __init__(self, warm_up: int):
        self.warm_up, self.marks = warm_up, list[Any]()

    def __call__(self, event: dict[str, Any]) -> None:
        if "loss" not in event:
            return
        if event["step"] == self.warm_up and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if event["step"] >= self.warm_up:
            self.marks.append(_now())

    def milliseconds(self) -> list[float]:
        if not torch.cuda.is_available():
            return [1000 * (after - before) for before, after in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(self.marks)]


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def measure(
    name: str, arm: str, batch: int, folder: Path, warm_up: int = WARM_UP, timed: int = TIMED
) -> dict[str, Any]:
    """One arm, in this process."""
    geometry = KNOWN[name]
    base = write_base(geometry, folder / name)
    bench = Bench.open(Workspace(folder / f"{name}-home"))
    bench.catalog.migrate()
    rows = cache_noise(bench, base, geometry)
    steps = warm_up + timed
    changes = {"train_batch_size": batch, "max_train_steps": steps, "checkpointing_steps": steps}
    changes |= {"resolution": geometry.side}
    training = TrainingConfig.model_validate(CONFIG | changes | ARMS[arm])
    clock = Clock(warm_up)
    work = folder / f"{name}-work"
    fine_tune(bench, rows, base, training, work, on_event=clock, should_stop=lambda: False)
    spent = clock.milliseconds()
    step_ms = sum(spent) / len(spent)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "cpu"
    pictures_s = 1000 * batch / step_ms
    useful = step_flops(geometry, training.model_copy(update={"gradient_checkpointing": False}))
    done, peak = step_flops(geometry, training), peak_of(device)
    return {
        "base": name,
        "arm": arm,
        "batch": batch,
        "device": device,
        "steps": len(spent),
        "step_ms": round(step_ms, 3),
        "step_ms_median": round(median(spent), 3),
        "it_s": round(1000 / step_ms, 3),
        "images_s": round(pictures_s, 3),
        "tflop_image": round(useful / 1e12, 3),
        "mfu": round(useful * pictures_s / peak, 4) if peak else "unknown",
        "hfu": round(done * pictures_s / peak, 4) if peak else "unknown",
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "state": state_of_the_gpu(),
    }


def state_of_the_gpu() -> dict[str, int] | None:
    """Clock in MHz, temperature in degrees Celsius and power in watts, where nvidia-ml-py is installed."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    return {
        "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "watts": pynvml.nvmlDeviceGetPowerUsage(handle) // 1000,
    }


def in_a_process(name: str, arm: str, batch: int, folder: Path) -> dict[str, Any]:
    code = "import json, sys; from pathlib import Path; from tests.benchmarks.bench_gpu import measure; " + (
        "print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, arm, str(batch), str(folder)],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    )
    if done.returncode:
        return {"base": name, "arm": arm, "batch": batch, "error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a CUDA GPU, and here is none")
@pytest.mark.parametrize(("name", "batch"), [(name, batch) for name, sizes in BATCHES.items() for batch in sizes])
def test_how_fast_a_gpu_trains(name: str, batch: int, folder: Path):
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for repeat in range(REPEATS):
        for arm in list(ARMS)[:: -1 if repeat % 2 else 1]:
            run = in_a_process(name, arm, batch, folder)
            print(json.dumps(run))
            runs[arm].append(run)
    for arm, repeats in runs.items():
        rates = sorted(run["images_s"] for run in repeats if "error" not in run)
        if rates:
            print(f"{name} batch {batch} {arm}: {rates[len(rates) // 2]} images/s ({rates[0]} to {rates[-1]})")
    assert all("error" not in run for run in runs["eager"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")
