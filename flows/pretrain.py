"""Pre-training the embedded base model: drawings, curation, autoencoder, denoiser, pipeline, figures."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from components.catalog import runs
from components.config import CurationConfig, DataConfig, DataSource
from components.curation.snapshots import curate as make_snapshot
from components.curation.snapshots import curate_key, read_manifest
from components.demo.emoji import METADATA_NAME, SIZE, write_image_folder
from components.errors import BadInput, SafelightError, StageFailed, Stopped
from components.stages import Bench, ensure
from components.workspace import Workspace
from flows import services
from flows.open_run import git_commit, stopping_on_sigterm

DATASET = "emoji"
STAGES = ("vae", "unet", "assemble", "evaluate")


@flow(name="pretrain", persist_result=False)
def pretrain(node_modules: Path, out: Path, start: Path | None = None, device: str = "cpu", threads: int = 1) -> str:
    """Train autoencoder, text encoder and U-Net from scratch on emoji drawings; returns the pipeline's folder.

    Every step resumes where an earlier run of the same `out` was stopped. With `start`, a pipeline's folder, training
    goes on from its weights.
    """
    drawings = write_drawings(node_modules, out)
    kept = curate_drawings(drawings, out)
    for stage in STAGES[1:] if start else STAGES:
        train(stage, kept, out, start, device, threads)
    return str(out / "pipeline")


@task(name="write drawings", cache_policy=NO_CACHE, persist_result=False)
def write_drawings(node_modules: Path, out: Path) -> Path:
    write_image_folder(node_modules, out / "drawings")
    return out / "drawings"


@task(name="curate", cache_policy=NO_CACHE, persist_result=False)
def curate_drawings(drawings: Path, out: Path) -> Path:
    """A folder that lists the drawings that curation kept; the same shape in three styles is no near duplicate here."""
    bench = Bench.open(Workspace.from_environment())
    data = DataConfig(sources=(DataSource(path=str(drawings)),))
    curation = CurationConfig(min_side=SIZE, near_duplicates=False)
    key, scanned = curate_key(bench, data, curation, dataset=DATASET, training_size=SIZE)
    result = ensure(
        bench,
        "curate",
        key,
        lambda: make_snapshot(bench, data, curation, dataset=DATASET, training_size=SIZE, scanned=scanned, key=key),
    )
    names = {row.file_name for row in read_manifest(bench.store, result.product.facts["digest"])}
    kept = out / "kept"
    kept.mkdir(exist_ok=True)
    lines = (drawings / METADATA_NAME).read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if json.loads(line)["file_name"] in names]
    for line in chosen:
        name = json.loads(line)["file_name"]
        shutil.copyfile(drawings / name, kept / name)
    (kept / METADATA_NAME).write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return kept


@task(name="train", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def train(stage: str, data: Path, out: Path, start: Path | None, device: str, threads: int) -> None:
    """One stage in a process of its own, which saves a checkpoint when it is asked to stop."""
    command = [
        sys.executable,
        "-m",
        "components.training.pretraining",
        "--stage",
        stage,
        "--data",
        str(data),
        "--out",
        str(out),
        "--device",
        device,
        "--threads",
        str(threads),
    ]
    child = subprocess.Popen(command + (["--start", str(start)] if start else []))
    try:
        code = child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if code:
        raise StageFailed(f"pretrain: {stage} ended with code {code}; run the same command to continue")


def main(arguments: Sequence[str]) -> int:
    """`safelight pretrain`: read the flags, start the services, run the flow; the catalog lists it like any other."""
    parser = argparse.ArgumentParser(prog="safelight pretrain", description=pretrain.description)
    parser.add_argument("--node-modules", type=Path, required=True, help="where npm installed the emoji packages")
    parser.add_argument("--out", type=Path, help="checkpoints and results; default: a folder of the workspace")
    parser.add_argument("--start", type=Path, help="go on from this pipeline's weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    options = parser.parse_args(list(arguments))
    if not options.node_modules.is_dir():
        raise BadInput(
            f"--node-modules {options.node_modules}: no such folder; components/base/README.md has the npm command"
        )
    workspace = Workspace.from_environment().create()
    services.adopt_environment(workspace, services.ensure_up(workspace))
    out = (options.out or workspace.home / "pretrain").resolve()
    bench = Bench.open(workspace)
    bench.catalog.migrate()
    settings: dict[str, Any] = {name: str(value) for name, value in vars(options).items() if value is not None}
    run_uid = runs.open_run(
        bench.catalog, name="embedded-base", kind="pretrain", recipe=settings, git_commit=git_commit()
    )
    status, error = "failed", None
    try:
        with stopping_on_sigterm():
            print(pretrain(options.node_modules, out, options.start, options.device, options.threads))
        status = "completed"
    except (Stopped, KeyboardInterrupt) as cause:
        status, error = "stopped", str(cause) or "interrupted"
        raise
    except SafelightError as cause:
        error = str(cause)
        raise
    finally:
        runs.close_run(bench.catalog, run_uid, status, error=error)
    return 0
