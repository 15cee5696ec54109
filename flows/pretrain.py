"""Pre-training the embedded base model: drawings, curation, autoencoder, denoiser, pipeline, figures."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from components.catalog import runs
from components.config import CurationConfig, DataConfig, DataSource
from components.curation.manifest import read_manifest
from components.curation.snapshots import curate as make_snapshot
from components.curation.snapshots import curate_key
from components.demo.emoji import METADATA_NAME, SIZE, write_image_folder
from components.errors import StageFailed
from components.stages import Bench, ensure
from components.storage import atomic_write
from components.training.pretraining_config import PretrainConfig
from components.workspace import Workspace
from flows.open_run import recorded, stopping_on_sigterm
from flows.tracking.tracker import Tracker

DATASET = "emoji"
NAME = "embedded-base"
STAGES = ("vae", "unet", "assemble", "evaluate")
PICTURES = ("grid.png", "curves.png")  # what the evaluation draws
CONFIG_NAME = "config.json"
FOLLOW_EVERY_S = 2.0
_trackers: dict[str, Tracker] = {}  # of the runs of this process: tasks are handed plain values


@flow(name="pretrain", persist_result=False)
def pretrain(
    node_modules: Path,
    out: Path,
    start: Path | None = None,
    autoencoder: Path | None = None,
    device: str = "cpu",
    threads: int = 1,
    config: PretrainConfig | None = None,
) -> dict[str, Any]:
    """Train autoencoder, text encoder and U-Net from scratch on emoji drawings; returns the run's document.

    Every step resumes where an earlier run of the same `out` was stopped. With `start`, a pipeline's folder, training
    goes on from its weights; with `autoencoder`, another one's, only the denoiser is trained.
    """
    config = config or PretrainConfig()
    bench = Bench.open(Workspace.from_environment())
    bench.catalog.migrate()
    settings = {
        "name": NAME,
        "out": str(out),
        "start": str(start) if start else None,
        "autoencoder": str(autoencoder) if autoencoder else None,
        "device": device,
        "threads": threads,
        "config": config.model_dump(mode="json"),
    }
    tags = {"prefect.flow_run_id": str(flow_run.id)} if flow_run.id else {}
    with stopping_on_sigterm(), recorded(bench, settings, kind="pretrain", tags=tags) as (run_uid, tracker):
        runs.update_run(bench.catalog, run_uid, prefect_flow_run_id=flow_run.id or None)
        _trackers[run_uid] = tracker
        try:
            drawings = write_drawings(node_modules, out)
            kept = curate_drawings(run_uid, drawings, out)
            with atomic_write(out / CONFIG_NAME) as file:
                file.write(config.model_dump_json(indent=2).encode())
            shipped = {name: str(folder) for name, folder in (("start", start), ("autoencoder", autoencoder)) if folder}
            for stage in STAGES[1:] if shipped else STAGES:
                train(run_uid, stage, kept, out, shipped, device, threads)
            figures = publish(run_uid, out)
        finally:
            del _trackers[run_uid]
    return {"run_uid": run_uid, "pipeline": str(out / "pipeline"), "figures": figures, "mlflow": tracker.url}


@task(name="write drawings", cache_policy=NO_CACHE, persist_result=False)
def write_drawings(node_modules: Path, out: Path) -> Path:
    write_image_folder(node_modules, out / "drawings")
    return out / "drawings"


@task(name="curate", cache_policy=NO_CACHE, persist_result=False)
def curate_drawings(run_uid: str, drawings: Path, out: Path) -> Path:
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
    facts = result.product.facts
    _trackers[run_uid].dataset(f"{DATASET}@{facts['version']}", facts["digest"], str(drawings))
    names = {row.file_name for row in read_manifest(bench.store, facts["digest"])}
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
def train(run_uid: str, stage: str, data: Path, out: Path, shipped: dict[str, str], device: str, threads: int) -> None:
    """One stage in a process of its own, which saves a checkpoint when it is asked to stop; its journal is relayed."""
    options = {
        "stage": stage,
        "data": data,
        "out": out,
        "config": out / CONFIG_NAME,
        "device": device,
        "threads": threads,
    } | shipped
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "components.training.pretraining", *words]
    child = subprocess.Popen(command, stdout=sys.stderr.fileno())  # stdout is for results
    try:
        while True:
            try:
                code = child.wait(timeout=FOLLOW_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                relay(run_uid, stage, out / stage / "journal.jsonl")
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    finally:
        relay(run_uid, stage, out / stage / "journal.jsonl")
    if code:
        raise StageFailed(f"pretrain: {stage} ended with code {code}; run the same command to continue")


def relay(run_uid: str, stage: str, journal: Path) -> None:
    """Tell the tracker what a stage's journal says; points that it knows are skipped there."""
    if not journal.is_file():
        return
    for line in journal.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        step = int(event.pop("step"))
        _trackers[run_uid].metrics(step, {f"{stage}/{name}": value for name, value in event.items()})


@task(name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish(run_uid: str, out: Path) -> dict[str, Any]:
    """The model card's figures, and its pictures, as the run's metrics and artifacts; returns the figures."""
    bench, tracker, folder = Bench.open(Workspace.from_environment()), _trackers[run_uid], out / "evaluation"
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    tracker.document("figures.json", figures)
    tracker.metrics(0, {f"base/{name}": value for name, value in figures.items()})
    for name in PICTURES:
        if (folder / name).is_file():
            tracker.artifact(name, bench.store.put((folder / name).read_bytes()).sha256)
    return figures
