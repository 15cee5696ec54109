"""One curation in a process of its own: `python -m tests.benchmarks.our_curation HOME FOLDER SIZE [--scan]`.

Prints what it took as JSON: seconds of wall and of CPU (all of its processes), their peak memory together, and counts.
"""

import argparse
import json
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from components.config import CurationConfig, DataConfig, DataSource
from components.curation.snapshots import curate, curate_key
from components.stages import Bench
from components.workspace import Workspace
from tests.benchmarks.paired import cpu_seconds

SAMPLE_S = 1.0
HIGH_WATER = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)


def cpu_seconds_so_far() -> float:
    """Of this process and its children, those that still run too."""
    total = cpu_seconds()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


class Memory:
    """The most that this process and its children can have held in memory together: the sum of their own peaks, which
    the kernel keeps, so that looking once a second is enough and costs next to nothing."""

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}  # bytes, by process
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def peak(self) -> int:
        self._look()
        return sum(tuple(self.peaks.values()))

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(SAMPLE_S)

    def _look(self) -> None:
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            with suppress(OSError, psutil.NoSuchProcess):
                if said := HIGH_WATER.search(Path(f"/proc/{process.pid}/status").read_text()):
                    self.peaks[process.pid] = int(said[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("folder")
    parser.add_argument("size", type=int)
    parser.add_argument("--scan", action="store_true", help="look only at what has changed")
    asked = parser.parse_args()
    bench = Bench.open(Workspace(asked.home))
    bench.catalog.migrate()
    data, curation, memory = DataConfig(sources=(DataSource(path=asked.folder),)), CurationConfig(), Memory()
    at: list[tuple[float, float]] = [(time.monotonic(), cpu_seconds_so_far())]
    examined_at: list[tuple[float, float]] = []
    key, found = curate_key(bench, data, curation, dataset="bench", training_size=asked.size)
    at.append((time.monotonic(), cpu_seconds_so_far()))
    told: dict[str, Any] = {"files": len(found.files), "hashed": found.hashed}
    if not asked.scan:
        def progress(done: int, total: int) -> None:
            if done == total:
                examined_at[:] = [(time.monotonic(), cpu_seconds_so_far())]

        product = curate(bench, data, curation, dataset="bench", training_size=asked.size, scanned=found, key=key,
                         on_progress=progress)
        at += [*examined_at, (time.monotonic(), cpu_seconds_so_far())]
        told |= {name: product.facts[name] for name in ("kept", "rejected", "examined")}
    for name, before, after in zip(("scan", "examine", "judge"), at, at[1:], strict=False):
        told[name] = {"wall": after[0] - before[0], "cpu": after[1] - before[1]}
    told["all"] = {"wall": at[-1][0] - at[0][0], "cpu": at[-1][1] - at[0][1]}
    print(json.dumps(told | {"peak_mb": memory.peak / 2**20}))


if __name__ == "__main__":
    main()
