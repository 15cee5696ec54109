"""kill -9 campaign: a small recipe is killed with its whole process group in stage after stage, then run again.

    python -m tests.soak.kills --kills 30 --folder /tmp/kills

A chain is one workspace in which the same command is killed once in each stage, every time at the chain's share of
that stage's duration, and then left to end; the chains' shares are spread evenly. The servers are shared. The tally in
`tally.jsonl` is kept, and a campaign that was itself interrupted goes on where it was. Passes when every chain ends
with the sha256 of the undisturbed run, nothing of a killed run is left running, and `safelight doctor --fix` leaves no
run in state running.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from components.catalog import runs
from components.catalog.database import Catalog
from components.workspace import Workspace
from tests.pictures import write_pictures, write_recipe

GRACE_S = 5.0  # for a child to notice that its parent is gone
LIMIT_S = 600.0


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", *words]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"SAFELIGHT_HOME": str(home)}


def answer(home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """What a `safelight` command says and ends with."""
    return subprocess.run(
        command(*words), env=environment(home), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def run(home: Path, recipe: Path) -> dict[str, Any]:
    """The run card of an undisturbed `safelight retrain`."""
    told = answer(home, "retrain", str(recipe), "--json")
    if told.returncode != 0:
        raise SystemExit(f"retrain ended with {told.returncode}: {told.stdout[-2000:]} {told.stderr[-2000:]}")
    return json.loads(told.stdout)


def kill_in(stage: str, home: Path, *words: str, delay_s: float = 0.0) -> bool:
    """Start a command and SIGKILL its process group `delay_s` after the catalog says that it is in `stage`.

    Returns whether the run was still in that stage. Raises: AssertionError when the command ends before it gets there.
    """
    process = subprocess.Popen(
        command(*words),
        env=environment(home),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + LIMIT_S
    while stage not in stages_running(home):
        assert process.poll() is None, f"the run ended before it reached {stage}"
        assert time.monotonic() < deadline, f"{stage} was not reached in {LIMIT_S:.0f} s"
        time.sleep(0.02)
    time.sleep(delay_s)
    hit = stage in stages_running(home)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return hit


def stages_running(home: Path) -> list[str]:
    """The stage of every run that the workspace's catalog believes to be running, killed ones included."""
    if not (home / "catalog.db").exists():
        return []
    try:
        return [run.progress.get("stage", "") for run in runs.running(_catalog(home))]
    except Exception:  # the tables are being made
        return []


def left_running(home: Path) -> list[int]:
    """Processes that still work for the workspace after the grace period."""
    deadline = time.monotonic() + GRACE_S
    while True:
        found = [process.pid for process in psutil.process_iter() if _works_for(process, home)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def chain(home: Path, recipe: Path, durations: dict[str, float], share: float) -> dict[str, Any]:
    """Kill the run once in each stage at `share` of its duration, let it end, and say what became of it."""
    shutil.rmtree(home, ignore_errors=True)
    kills = []
    for stage, seconds in durations.items():
        hit = kill_in(stage, home, "retrain", str(recipe), delay_s=share * seconds)
        kills.append({"stage": stage, "after_s": round(share * seconds, 2), "hit": hit, "orphans": left_running(home)})
    card = run(home, recipe)
    doctor = answer(home, "doctor", "--fix", "--json")
    ended = {
        "share": round(share, 3),
        "kills": kills,
        "sha256": card["adapter"]["sha256"],
        "outcomes": {s["name"]: s["outcome"] for s in card["stages"]},
        "doctor": doctor.returncode,
        "still_running": len(stages_running(home)),
    }
    shutil.rmtree(home, ignore_errors=True)
    return ended


def passed(ended: dict[str, Any], wanted: str) -> bool:
    clean = not ended["still_running"] and not any(kill["orphans"] for kill in ended["kills"])
    return clean and ended["sha256"] == wanted


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=30, help="rounded up to whole chains")
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--base", type=Path, help="a base in diffusers layout; default: a tiny one, random weights")
    arguments = options.parse_args()
    folder: Path = arguments.folder.resolve()
    base = arguments.base or folder / "base"
    if not base.exists():
        from tests.tiny import tiny_stable_diffusion

        tiny_stable_diffusion(base)
    recipe = write_recipe(folder / "recipe.toml", write_pictures(folder / "pictures"), base)
    from flows import services

    addresses = services.ensure_up(Workspace(folder / "services").create())
    os.environ |= {"PREFECT_API_URL": f"{addresses.prefect_url}/api", "SAFELIGHT_MLFLOW_URI": addresses.mlflow_url}
    tally_path = folder / "tally.jsonl"
    tally = [json.loads(line) for line in tally_path.read_text().splitlines()] if tally_path.exists() else []
    if not tally:
        shutil.rmtree(folder / "undisturbed", ignore_errors=True)
        card = run(folder / "undisturbed", recipe)
        durations = {stage["name"]: stage["seconds"] for stage in card["stages"]}
        tally = [{"sha256": card["adapter"]["sha256"], "durations": durations}]
        _append(tally_path, tally[0])
    wanted, durations = tally[0]["sha256"], tally[0]["durations"]
    chains = -(-arguments.kills // len(durations))
    for index in range(len(tally) - 1, chains):
        tally.append(chain(folder / f"chain-{index:03d}", recipe, durations, (index + 0.5) / chains))
        _append(tally_path, tally[-1])
    bad = [ended for ended in tally[1:] if not passed(ended, wanted)]
    print(f"{sum(len(ended['kills']) for ended in tally[1:])} kills in {chains} chains, {len(bad)} chains failed")
    sys.exit(1 if bad else 0)


@cache
def _catalog(home: Path) -> Catalog:
    return Catalog(Workspace(home).catalog_url)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def _works_for(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get("SAFELIGHT_HOME") == str(home)
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
