"""Paired comparisons on a machine that is not quiet: a fresh process for each run, orders that cancel drift, raw data.

The first pair of a comparison is a warm-up. Every run is a line in a JSON-lines file as soon as it has ended, so a
comparison that was interrupted goes on where it was.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
BUSY = 4.0  # a load average above it is told beside the result
RESAMPLES = 10_000
Run = dict[str, Any]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
    "PYTHONPATH": str(ROOT),
}


def cpu_seconds() -> float:
    """Of this process and its children that have ended, in microseconds where `os.times` counts hundredths."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of paired ratios with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.pairs} pairs"


def median_ratio(ratios: Sequence[float]) -> Ratio:
    """Of the ratios of each pair; the pairs are what is drawn again. Raises: ValueError without any."""
    values = np.asarray(ratios, dtype=np.float64)
    if not len(values):
        raise ValueError("no pairs to compare")
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(values)), float(low), float(high), len(values))


def rounds(arms: Sequence[str], count: int) -> Iterator[tuple[int, int, str]]:
    """(round, place, arm): `arms` forward and backward in turns (ABBA); round 0 is the warm-up of `count` more."""
    for number in range(count + 1):
        yield from ((number, place, arm) for place, arm in enumerate(arms if number % 2 == 0 else reversed(arms)))


def run_rounds(raw: Path, comparison: str, arms: Sequence[str], count: int, run: Callable[[str], Run]) -> list[Run]:
    """The runs of a comparison, `run(arm)` for each that `raw` does not hold yet; the warm-up is left out."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    held = [json.loads(line) for line in raw.read_text("utf-8").splitlines()] if raw.exists() else []
    done = {(line["round"], line["place"]): line for line in held if line["comparison"] == comparison}
    for number, place, arm in rounds(arms, count):
        if (number, place) in done:
            continue
        facts = {"comparison": comparison, "round": number, "place": place, "arm": arm, "load": os.getloadavg()[0]}
        done[number, place] = facts | run(arm)
        with raw.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[number, place]) + "\n")
    return [line for (number, _), line in sorted(done.items()) if 0 < number <= count]


def ratios(runs: Sequence[Run], key: str, numerator: str, denominator: str) -> list[float]:
    """`key` of one arm over that of another, round by round."""
    of_round: dict[int, dict[str, float]] = {}
    for run in runs:
        of_round.setdefault(run["round"], {})[run["arm"]] = run[key]
    return [found[numerator] / found[denominator] for found in of_round.values()]


def busy(runs: Sequence[Run]) -> int:
    """How many rounds met a load average above BUSY."""
    return len({run["round"] for run in runs if run["load"] > BUSY})


def answer(run: Callable[[dict[str, Any]], Run]) -> None:
    """What a module that `child` starts does: read the request in argv[1], write the result to argv[2]."""
    told, said = map(Path, sys.argv[1:])
    said.write_text(json.dumps(run(json.loads(told.read_text(encoding="utf-8")))), encoding="utf-8")


def child(module: str, request: dict[str, Any]) -> Run:
    """What `python -m module` answers to a request, with wall time and CPU time of its process.

    Raises: RuntimeError with the end of what it said when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        told, said = Path(folder) / "request.json", Path(folder) / "result.json"
        told.write_text(json.dumps(request), encoding="utf-8")
        started, before = time.monotonic(), os.times()
        done = subprocess.run(
            [sys.executable, "-m", module, str(told), str(said)],
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-2000:]}")
        after = os.times()
        result = json.loads(said.read_text(encoding="utf-8"))
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return result | {"process_wall_s": round(time.monotonic() - started, 3), "process_cpu_s": round(spent, 3)}


class Steps:
    """CPU and wall seconds at the start of a training and after each of its steps, and the step's loss."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        self.cpu_s.append(round(time.process_time(), 4))
        self.wall_s.append(round(time.monotonic(), 4))

    def note(self, loss: float) -> None:
        self.begin()
        self.losses.append(loss)

    def facts(self) -> Run:
        wall_s = [round(wall - self.wall_s[0], 4) for wall in self.wall_s]
        return {"cpu_s": self.cpu_s, "wall_s": wall_s, "losses": self.losses, "peak_memory_mb": peak_memory_mb()}


def peak_memory_mb() -> int:
    """The largest resident set of this process so far, from Linux; `getrusage` begins with that of the parent."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(kilobytes) // 1024
