"""A folder of a million files: what it takes to look through it, to look again, and to make a snapshot of it.

    python -m tests.soak.many_files --count 1000000 --folder /tmp/many

Nearly all of the files are empty or hold the header of a picture and nothing else, three are pictures. Each step is a
process of its own, so that its peak of memory is its own:

- the first look is killed by SIGKILL once it says that it is half way
- the second goes on from there: it hashes the other half and nothing of what the first one committed
- the third opens nothing
- a snapshot keeps the three pictures; its memory is told and not judged

Passes when that is so, no look takes a gigabyte, and each one told how far it was at least once for every thousand
files. The files stay, and what was made before is not made again.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from components.catalog.models import SourceFile
from components.config import CurationConfig, DataConfig, DataSource
from components.curation.scanning import scan
from components.curation.snapshots import curate
from components.stages import Bench
from tests.curation.folders import new_bench, picture, settle
from tests.curation.handmade import png

MEGABYTES = 1024  # that no look may reach
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


def killed_look(bench: Bench, data: DataConfig) -> dict[str, Any]:
    """A look that does not survive half of its files."""

    def kill(step: str, done: int, total: int | None) -> None:
        if step == "scanning" and total is not None and done >= total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    scan(bench, data, on_progress=kill)
    raise AssertionError("it was not told of its half")


def look(bench: Bench, data: DataConfig) -> dict[str, Any]:
    told = Counter[str]()
    known = _known(bench)
    found = scan(bench, data, on_progress=lambda step, done, total: told.update([step]))
    return {"files": len(found.files), "known": known, "hashed": found.hashed, "told": told}


def _known(bench: Bench) -> int:
    """Files that an earlier look has committed."""
    with bench.catalog.read() as session:
        return session.scalar(select(func.count()).select_from(SourceFile)) or 0


def snapshot(bench: Bench, data: DataConfig) -> dict[str, Any]:
    told: list[int] = []
    made = curate(bench, data, CurationConfig(), dataset="many", training_size=64,
                  on_progress=lambda done, total: told.append(done))  # fmt: skip
    return {name: made.facts[name] for name in ("kept", "rejected", "examined")} | {"progress": len(told)}


def measured(step: Callable[[Bench, DataConfig], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What a step gives in a process of its own, with its seconds and its peak of memory in megabytes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
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
    _, status, usage = os.wait4(child, 0)
    if not told and os.WIFSIGNALED(status):
        peak = usage.ru_maxrss // 1024
        told = json.dumps({"step": step.__name__, "signal": os.WTERMSIG(status), "megabytes": peak})
    if not told:
        sys.exit(f"{step.__name__} ended without a word")
    print(told, flush=True)
    return json.loads(told)


def went_wrong(count: int, killed: dict[str, Any], second: dict[str, Any], third: dict[str, Any],
               last: dict[str, Any]) -> list[str]:  # fmt: skip
    """What of this page's promises was not kept."""
    files = count + PICTURES
    promises = {
        "the first look was killed": killed.get("signal") == signal.SIGKILL,
        "it had committed half of the files": files // 2 <= second["known"] < files,
        "the second look hashed the others": second["hashed"] == files - second["known"],
        "the third look hashed nothing": third["hashed"] == 0,
        "all files were looked at": second["files"] == third["files"] == files,
        "how far it was, was told": all(
            told[step] >= count // 1000 for told in (second["told"], third["told"]) for step in ("listing", "scanning")
        ),
        "no look took a gigabyte": max(step["megabytes"] for step in (killed, second, third)) < MEGABYTES,
        "the pictures were kept": last["kept"] == PICTURES,
    }
    return [promise for promise, kept in promises.items() if not kept]


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
        settle()
    shutil.rmtree(folder / "home", ignore_errors=True)
    steps = [measured(step, folder) for step in (killed_look, look, look, snapshot)]
    with (folder / "tally.jsonl").open("a") as file:
        file.writelines(json.dumps(step) + "\n" for step in steps)
    broken = went_wrong(arguments.count, *steps)
    peak = max(step["megabytes"] for step in steps[:3])
    print(f"{arguments.count} files, {peak} MB at most for a look: " + ("; not so: ".join(["failed", *broken]) if broken
                                                                      else "passed"))  # fmt: skip
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
