"""A folder of a million files: what it takes to look through it, to look again, and to make a snapshot of it.

    python -m tests.soak.many_files --count 1000000 --folder /tmp/many

Nearly all of the files are empty or hold the header of a picture and nothing else, three are pictures. Each step is a
process of its own, so that its peak of memory is its own. Passes when no step takes a gigabyte, the second look opens
nothing, and of all files the three pictures are kept. The files stay, and what was made before is not made again.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.config import CurationConfig, DataConfig, DataSource
from components.curation.scanning import scan
from components.curation.snapshots import curate
from components.stages import Bench
from tests.curation.folders import new_bench, picture
from tests.curation.handmade import png

MEGABYTES = 1024  # that no step may reach
IN_A_FOLDER = 10_000
PICTURES = 3


def make_files(folder: Path, count: int) -> None:
    """One in ten with a header of its own; ten thousand to a folder, as tools that make so many do."""
    for number in range(count):
        path = folder / f"{number // IN_A_FOLDER:05}" / f"{number:07}.png"
        if number % IN_A_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(1 + number, 70_000, 2, 8, b"") if number % 10 == 0 else b"")
    for seed in range(PICTURES):
        picture(seed).save(folder / f"picture-{seed}.png")
    (folder.parent / "made").write_text(str(count))


def look(bench: Bench, data: DataConfig) -> dict[str, Any]:
    found = scan(bench, data)
    return {"files": len(found.files), "hashed": found.hashed}


def snapshot(bench: Bench, data: DataConfig) -> dict[str, Any]:
    told: list[int] = []
    made = curate(bench, data, CurationConfig(), dataset="many", training_size=64,
                  on_progress=lambda done, total: told.append(done))  # fmt: skip
    return {name: made.facts[name] for name in ("kept", "rejected", "examined")} | {"progress": len(told)}


def measured(step: Callable[[Bench, DataConfig], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What a step gives in a process of its own, with its seconds and its peak of memory in megabytes."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        started, code = time.monotonic(), 1
        try:
            data = DataConfig(sources=(DataSource(path=str(folder / "data"), class_tokens="a thing"),))
            found = step(new_bench(folder / "home"), data)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            line = (
                {"step": step.__name__} | found | {"seconds": round(time.monotonic() - started, 1), "megabytes": peak}
            )
            os.write(writer, json.dumps(line).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    os.wait()
    if not told:
        sys.exit(f"{step.__name__} ended without a word")
    print(told, flush=True)
    return json.loads(told)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=1_000_000)
    options.add_argument("--folder", type=Path, required=True)
    arguments = options.parse_args()
    folder: Path = arguments.folder.resolve()
    made = folder / "made"
    if not made.exists() or made.read_text() != str(arguments.count):
        shutil.rmtree(folder, ignore_errors=True)
        make_files(folder / "data", arguments.count)
    shutil.rmtree(folder / "home", ignore_errors=True)
    steps = [measured(step, folder) for step in (look, look, snapshot)]
    with (folder / "tally.jsonl").open("a") as file:
        file.writelines(json.dumps(step) + "\n" for step in steps)
    peak = max(step["megabytes"] for step in steps)
    passed = peak < MEGABYTES and steps[1]["hashed"] == 0 and steps[2]["kept"] == PICTURES
    print(f"{arguments.count} files, {peak} MB at most: {'passed' if passed else 'failed'}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
