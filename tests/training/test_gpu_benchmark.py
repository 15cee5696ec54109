"""What the GPU benchmark counts and how it runs, as far as that needs no GPU."""

from pathlib import Path

import pytest

from components.config import TrainingConfig
from tests.benchmarks import bench_gpu
from tests.benchmarks.bench_gpu import measure, peak_of
from tests.benchmarks.geometry import SD15, SDXL, Geometry, step_flops

PUBLISHED_TFLOP = {"sd15": 1.725, "sdxl": 14.19}  # a picture's forward and backward pass, LoRA of rank 16 on attention


@pytest.mark.parametrize(("name", "geometry"), [("sd15", SD15), ("sdxl", SDXL)])
def test_the_operations_of_a_step_are_those_that_were_counted_elsewhere(name: str, geometry: Geometry):
    counted = step_flops(geometry, TrainingConfig(rank=16, targets="attention")) / 1e12
    assert counted == pytest.approx(PUBLISHED_TFLOP[name], rel=0.01)


def test_the_benchmark_trains_and_counts_what_is_computed_again_as_done_but_not_as_useful(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From end to end, on a small model and whatever device is here: eight steps, of which five are timed."""
    monkeypatch.setattr(bench_gpu, "peak_of", lambda device: 1e12)
    run = measure("tiny", "checkpointed", 2, tmp_path, warm_up=3, timed=5)
    assert run["steps"] == 5
    assert run["images_s"] == pytest.approx(2 * run["it_s"], rel=1e-3) and run["it_s"] > 0
    assert run["hfu"] > 1.2 * run["mfu"] > 0


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_known_by_the_devices_name(device: str, peak: float | None):
    assert peak_of(device) == peak
