"""kill -9 campaign: a small recipe is killed with its whole process group at many moments, then run again.

    python -m tests.soak.kills --kills 30 --folder /tmp/kills

Each kill has a workspace of its own; the servers are shared. The tally in `tally.jsonl` is kept, and a campaign that
was itself interrupted goes on where it was. Passes when every killed run, run again, ends with the sha256 of the
undisturbed one, nothing of it is left running, and `safelight doctor --fix` leaves no run in state running.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
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


def run(home: Path, recipe: Path) -> dict[str, Any]:
    """The run card of an undisturbed `safelight retrain`."""
    answer = subprocess.run(
        command("retrain", str(recipe), "--json"),
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if answer.returncode != 0:
        raise SystemExit(f"retrain ended with {answer.returncode}: {answer.stdout[-2000:]} {answer.stderr[-2000:]}")
    return json.loads(answer.stdout)


def kill_after(home: Path, recipe: Path, delay_s: float) -> bool:
    """Start the command, kill its process group after `delay_s`; whether it was still running then."""
    process = subprocess.Popen(
        command("retrain", str(recipe), "--json"),
        env=environment(home),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process.wait(timeout=delay_s)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def left_running(home: Path) -> list[int]:
    """Processes that still work for the workspace after the grace period."""
    deadline = time.monotonic() + GRACE_S
    while True:
        found = [process.pid for process in psutil.process_iter() if _works_for(process, home)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _works_for(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get("SAFELIGHT_HOME") == str(home)
    except psutil.Error:
        return False


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument(
        "--base", type=Path, help="a base in diffusers layout; default: a tiny one with random weights"
    )
    arguments = options.parse_args()
    folder: Path = arguments.folder.resolve()
    base = arguments.base or folder / "base"
    if not base.exists():
        from tests.tiny import tiny_stable_diffusion

        tiny_stable_diffusion(base)
    recipe = write_recipe(folder / "recipe.toml", write_pictures(folder / "pictures"), base)
    from flows import services

    shared = Workspace(folder / "services").create()
    addresses = services.ensure_up(shared)
    os.environ |= {"PREFECT_API_URL": f"{addresses.prefect_url}/api", "SAFELIGHT_MLFLOW_URI": addresses.mlflow_url}
    tally_path = folder / "tally.jsonl"
    tally = [json.loads(line) for line in tally_path.read_text().splitlines()] if tally_path.exists() else []
    started = time.monotonic()
    wanted = run(folder / "undisturbed", recipe)["adapter"]["sha256"]
    duration_s = time.monotonic() - started if not tally else tally[0]["duration_s"]
    for index in range(len(tally), arguments.kills):
        delay_s = duration_s * (index + 0.5) / arguments.kills
        home = folder / f"kill-{index:03d}"
        shutil.rmtree(home, ignore_errors=True)
        killed = kill_after(home, recipe, delay_s)
        orphans = left_running(home)
        states = [entry.progress.get("stage") for entry in _running(home)]
        card = run(home, recipe)
        doctor = subprocess.run(
            command("doctor", "--fix", "--json"),
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        line = {
            "kill": index,
            "delay_s": round(delay_s, 2),
            "duration_s": duration_s,
            "killed": killed,
            "stage": states,
            "orphans": orphans,
            "same": card["adapter"]["sha256"] == wanted,
            "still_running": len(_running(home)),
            "doctor": doctor.returncode,
            "outcomes": {s["name"]: s["outcome"] for s in card["stages"]},
        }
        with tally_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        tally.append(line)
        print(json.dumps(line), flush=True)
        shutil.rmtree(home, ignore_errors=True)
    bad = [line for line in tally if not line["same"] or line["orphans"] or line["still_running"]]
    print(f"{len(tally)} kills, {len(bad)} failures")
    sys.exit(1 if bad else 0)


def _running(home: Path) -> list[Any]:
    catalog = Catalog(Workspace(home).catalog_url)
    return runs.running(catalog) if (home / "catalog.db").exists() else []


if __name__ == "__main__":
    main()
