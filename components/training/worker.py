"""The child process in which torch lives: JSON requests on stdin, JSON events on stdout, gone when its parent is gone.

A request is {"stage", "home", ...}; while it works the child writes events such as {"event": "progress", "done",
"total"}, and last either {"event": "result", "product"} or {"event": "error", "type", "message"}. End of file on stdin
means that the parent has died: the child ends at once. SIGTERM saves a checkpoint and ends the request as Stopped.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from components.config import BaseModelConfig, EvaluationConfig, PromotionConfig, TrainingConfig
from components.errors import SafelightError
from components.stages import Bench, Product
from components.storage import ObjectRef, lack_of_room
from components.workspace import Workspace

PARENT_GONE = 137
Event = Callable[[dict[str, Any]], None]
_stop = threading.Event()


def main() -> None:
    events = _claim_stdout()
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    while not _stop.is_set():
        try:
            request = requests.get(timeout=0.2)
        except queue.Empty:
            continue
        try:
            product = STAGES[request["stage"]](Bench.open(Workspace(Path(request["home"]))), request, emit)
            emit({"event": "result", "product": asdict(product)})
        except SafelightError as error:
            emit({"event": "error", "type": type(error).__name__, "message": str(error)})
        except Exception as error:
            if full := lack_of_room(error, Path(request["home"])):
                emit({"event": "error", "type": type(full).__name__, "message": str(full)})
                continue
            import traceback

            traceback.print_exc(file=sys.stderr)
            emit(
                {
                    "event": "error",
                    "type": "StageFailed",
                    "message": f"{request['stage']}: {type(error).__name__}: {error}",
                }
            )


def _claim_stdout() -> IO[str]:
    """Keep stdout for events; whatever a library prints goes to stderr."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def _listen(requests: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(PARENT_GONE)


def _progress(emit: Event) -> Callable[[int, int], None]:
    return lambda done, total: emit({"event": "progress", "done": done, "total": total})


def _cache(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.curation.manifest import read_manifest
    from components.families.bases import resolve_base
    from components.latents.caching import cache_latents
    from components.latents.keys import training_sizing
    from components.latents.wording import Wording

    base, training = resolve_base(BaseModelConfig(**request["base"])), TrainingConfig(**request["training"])
    return cache_latents(
        bench,
        read_manifest(bench.store, request["snapshot"]),
        base,
        training_sizing(base, training),
        _progress(emit),
        wording=Wording.of(training),
    )


def _fine_tune(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    """A request with a rank comes from the first process of the training, which alone is told what happens."""
    from components.curation.manifest import read_manifest
    from components.families.bases import resolve_base
    from components.training.finetune import fine_tune
    from components.training.processes import joined, started

    training, work_dir = TrainingConfig(**request["training"]), bench.workspace.work_dir(request["key"])
    if rank := request.get("rank"):
        emit({"event": "ready"})
        meeting = joined(rank, training.num_processes, work_dir)
    else:
        meeting = started(request, training.num_processes, work_dir, _stop.is_set)
    with meeting as processes:
        return fine_tune(
            bench,
            read_manifest(bench.store, request["snapshot"]),
            resolve_base(BaseModelConfig(**request["base"])),
            training,
            work_dir,
            on_event=emit,
            should_stop=_stop.is_set,
            processes=processes,
        )


def _evaluate(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.curation.manifest import read_manifest
    from components.evaluation.evaluate import Contender, evaluate
    from components.families.bases import resolve_base

    validation = request["validation"]
    return evaluate(
        bench,
        request["key"],
        read_manifest(bench.store, request["snapshot"]),
        resolve_base(BaseModelConfig(**request["base"])),
        [Contender(**entry) for entry in request["contenders"]],
        EvaluationConfig(**request["evaluation"]),
        PromotionConfig(**request["promotion"]),
        request["resolution"],
        ObjectRef(**validation) if validation else None,
        final_step=request["final_step"],
        snapshot_digest=request["snapshot"],
        run_uid=request["run_uid"],
        on_progress=_progress(emit),
    )


def _generate(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.evaluation.generation import Request, Settings, draw_gallery
    from components.families.bases import resolve_base

    base = resolve_base(BaseModelConfig(**request["base"]))
    done, total = 0, len(request["requests"])

    def advance(count: int) -> None:
        nonlocal done
        done += count
        emit({"event": "progress", "done": done, "total": total})

    settings = Settings.of(EvaluationConfig(**request["evaluation"]), base.architecture.geometry(base.path).resolution)
    pictures = draw_gallery(
        bench,
        base,
        request["adapter"],
        [Request(**entry) for entry in request["requests"]],
        settings,
        run_uid=None,
        on_progress=advance,
    )
    return Product(
        {
            str(i): ObjectRef(picture.sha256, bench.store.path(picture.sha256).stat().st_size)
            for i, picture in enumerate(pictures)
        },
        items=len(pictures),
    )


def _study(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.curation.manifest import read_manifest
    from components.evaluation.study import StudyPlan, study_samplers
    from components.families.bases import resolve_base

    return study_samplers(
        bench,
        read_manifest(bench.store, request["snapshot"]),
        {name: resolve_base(BaseModelConfig(**base)) for name, base in request["bases"].items()},
        StudyPlan.of(request["plan"]),
        EvaluationConfig(**request["evaluation"]),
        request["resolution"],
        run_uid=request["run_uid"],
        on_progress=_progress(emit),
    )


def _caption(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.captioning.captioning import Extent, caption_pictures
    from components.config import CaptionsConfig, DataConfig

    report = caption_pictures(
        bench,
        DataConfig(**request["data"]),
        CaptionsConfig(**request["captions"]),
        request["captioner"],
        dataset=request["dataset"],
        extent=Extent(**request["extent"]),
        on_event=emit,
        should_stop=_stop.is_set,
    )
    return Product({}, asdict(report), items=report.captioned)


def _describe(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.config import DataConfig
    from components.curation.caption_statistics import note_caption_statistics
    from components.families.bases import resolve_base

    base = resolve_base(BaseModelConfig(**request["base"]))
    note_caption_statistics(bench, request["snapshot_id"], request["snapshot"], base, DataConfig(**request["data"]))
    return Product({})


def _import(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.families.bases import resolve_base
    from components.training.imports import imported_adapter

    data, facts = imported_adapter(Path(request["path"]), resolve_base(BaseModelConfig(**request["base"])))
    return Product({"adapter": bench.store.put(data)}, facts)


def _export(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.training.export import export_adapter

    exported = export_adapter(bench, request["adapter"], Path(request["folder"]), run_uid=request["run_uid"])
    files = {layout: str(path) for layout, path in exported.files.items()}
    return Product({}, {"files": files, "skipped": exported.skipped})


def _measure(bench: Bench, request: dict[str, Any], emit: Event) -> Product:
    from components.curation.judges.measuring import measure
    from components.tensors import default_device

    return Product({}, items=measure(bench, request["work"], default_device(), _progress(emit)))


STAGES: dict[str, Callable[[Bench, dict[str, Any], Event], Product]] = {
    "cache": _cache,
    "fine-tune": _fine_tune,
    "evaluate": _evaluate,
    "generate": _generate,
    "import": _import,
    "export": _export,
    "study": _study,
    "measure": _measure,
    "caption": _caption,
    "describe": _describe,
}

if __name__ == "__main__":
    main()
