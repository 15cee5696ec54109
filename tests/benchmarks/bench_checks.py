"""Curation beside CleanVision and imagededup: CPU time, and what each finds of the same planted defects and twins.

`BENCH_PICTURES` says how many pictures (5,000), `BENCH_ROUNDS` how often all three go over them, in alternating order.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.paired import ENVIRONMENT, ROOT
from tests.benchmarks.planted import Truth, plant

PEERS = "build/peers"
HOW = (f"CHECK_PEERS names no interpreter: python3 -m venv {PEERS} && {PEERS}/bin/pip install cleanvision==0.3.7"
       f" scikit-learn PyWavelets && {PEERS}/bin/pip install --no-deps imagededup==0.3.3.post2 &&"
       f" CHECK_PEERS={PEERS}/bin/python make bench BENCHES=tests/benchmarks/bench_checks.py")
ARMS = ("safelight", "cleanvision", "imagededup")


def run(arm: str, folder: Path) -> tuple[float, dict[str, Any]]:
    """CPU seconds of a process that looks through the folder, with its children, and what it found."""
    module = str(ROOT / "tests" / "benchmarks" / "peers.py")
    command = ([sys.executable, "-m", "tests.benchmarks.our_checks"] if arm == "safelight"
               else [os.environ["CHECK_PEERS"], module, arm])
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        before = os.times()
        done = subprocess.run([*command, str(folder), str(result)], cwd=ROOT, check=False, capture_output=True,
                              text=True, env=os.environ | ENVIRONMENT | {"OPENBLAS_NUM_THREADS": "1"})
        after = os.times()
        if done.returncode:
            raise RuntimeError(f"{arm} ended with {done.returncode}: {done.stderr[-2000:]}")
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        return round(spent, 2), json.loads(result.read_text(encoding="utf-8"))


def scores(found: Iterable[Any], true: Iterable[Any]) -> str:
    """Precision, recall and F1 of a set."""
    said, truth = set(found), set(true)
    hit = len(said & truth)
    precision, recall = hit / max(len(said), 1), hit / max(len(truth), 1)
    return f"{precision:.3f} / {recall:.3f} / {2 * hit / max(len(said) + len(truth), 1):.3f}"


def pairs(found: Iterable[Iterable[str]]) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in found}


def table(truth: Truth, found: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of precision / recall / F1 per arm. Near duplicates are judged apart from exact ones."""
    exact, near = pairs(truth.exact), pairs(truth.near)
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for check, names in truth.flags.items():
        cells = [scores(arm["flags"][check], names) if arm["flags"] else "" for arm in found.values()]
        lines.append(f"| {check} | {' | '.join(cells)} |")
    lines.append(f"| exact | {' | '.join(scores(pairs(arm['exact']), exact) for arm in found.values())} |")
    lines.append(f"| near | {' | '.join(scores(pairs(arm['near']) - exact, near) for arm in found.values())} |")
    for kind in sorted(set(truth.kinds.values()) - {"bytes", "pixels"}):
        asked = pairs(pair for pair in truth.near if truth.kinds[pair[1]] == kind)
        share = [f"{len(asked & pairs(arm['near'])) / len(asked):.3f}" for arm in found.values()]
        lines.append(f"| recall of {kind} | {' | '.join(share)} |")
    wrong = [str(len(pairs(truth.unlike) & pairs(arm["near"]))) for arm in found.values()]
    return [*lines, f"| hard negatives joined, of {len(truth.unlike)} | {' | '.join(wrong)} |"]


def test_checks_and_duplicates_beside_cleanvision_and_imagededup(tmp_path: Path):
    if "CHECK_PEERS" not in os.environ:
        pytest.skip(HOW)
    count, rounds = int(os.environ.get("BENCH_PICTURES", "5000")), int(os.environ.get("BENCH_ROUNDS", "3"))
    folder = Path(os.environ.get("BENCH_FOLDER", tmp_path)) / f"planted-{count}"
    truth = plant(folder, count)
    spent: dict[str, list[float]] = {arm: [] for arm in ARMS}
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            seconds, found[arm] = run(arm, folder)
            spent[arm].append(seconds)
            print(f"round {number} {arm} {seconds} s", flush=True)
    ours, *theirs = (np.array(spent[arm]) for arm in ARMS)
    for name, other in (*zip(ARMS[1:], theirs, strict=True), ("both", sum(theirs))):
        print(f"CPU time, {name} / ours: {np.median(other / ours):.2f} ({', '.join(f'{r:.2f}' for r in other / ours)})")
    print("\n".join(table(truth, {arm: found[arm] for arm in ARMS})))
