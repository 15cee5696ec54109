"""Retraining: curate a dataset, cache its latents, fit an adapter, score its samples, register it."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from httpx import TransportError
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run

from components.catalog import runs
from components.catalog.models import Adapter, ModelVersion
from components.config import Recipe
from components.errors import ServiceUnavailable
from components.latents.keys import cache_key, training_size, training_sizing
from components.latents.wording import Wording
from components.stages import Product, StageResult
from components.workspace import Workspace
from flows import services
from flows.console import scan_event
from flows.keys import champion_of, evaluate_key, fine_tune_key, mirrored_aliases, register_key
from flows.open_run import OnEvent, OpenRun, open_run, stage_line, stopping_on_sigterm
from flows.tracking import registry
from flows.tracking.registration import Checkpoint, register_model

UpTo = Literal["curate", "cache", "fine-tune", "evaluate", "register"]
STAGES: tuple[UpTo, ...] = ("curate", "cache", "fine-tune", "evaluate", "register")
CARD_SCHEMA = 1
_open: dict[str, OpenRun] = {}  # tasks are handed a run's uid; what it stands for never leaves this process
_listeners: list[OnEvent] = []


@flow(name="retrain", flow_run_name="{recipe.name}", persist_result=False, validate_parameters=True)
def retrain(
    recipe: Recipe, upto: UpTo = "register", run_uid: str | None = None, verify: bool = False
) -> dict[str, Any]:
    """Curate a dataset, cache its latents, fit a LoRA adapter, score its samples, register it. Returns the run card."""
    with opened(recipe, run_uid, verify=verify) as run:
        snapshot = curate(run.run_uid)
        if reaches(upto, "cache"):
            cache_latents(run.run_uid, snapshot)
        if reaches(upto, "fine-tune"):
            fit_adapter(run.run_uid, snapshot)
            if reaches(upto, "evaluate"):
                report = evaluate(run.run_uid, snapshot)
                if reaches(upto, "register"):
                    register(run.run_uid, report)
        return publish(run)


def reaches(upto: UpTo, stage: UpTo) -> bool:
    return STAGES.index(upto) >= STAGES.index(stage)


# the steps: a task each, handing on keys and digests ---------------------------------------------------------------


@task(name="curate", cache_policy=NO_CACHE, persist_result=False)
def curate(run_uid: str) -> str:
    """The snapshot's digest."""
    from components.curation.snapshots import curate as make_snapshot
    from components.curation.snapshots import curate_key, sides_stand

    run = _open[run_uid]
    recipe, size = run.recipe, training_size(run.base, run.recipe.training)
    key, scanned = curate_key(
        run.bench,
        recipe.data,
        recipe.curation,
        dataset=recipe.name,
        training_size=size,
        captions=recipe.captions,
        verify=run.verify,
        on_progress=lambda step, done, total: run.relay(scan_event(step, done, total)),
    )
    for source in scanned.sources:
        run.relay({"event": "log", "message": str(source)})
    result = run.stage(
        "curate",
        key,
        lambda: make_snapshot(
            run.bench,
            recipe.data,
            recipe.curation,
            dataset=recipe.name,
            training_size=size,
            scanned=scanned,
            key=key,
            on_progress=_progress(run, "curate"),
            measure=lambda work: in_the_slot(run, {"stage": "measure", "work": work}),
        ),
        still_there=lambda product: sides_stand(run.bench, recipe.curation, recipe.name, product),
    )
    _note_snapshot(run, result.product)
    _describe_captions(run, result.product.facts)
    return result.product.facts["digest"]


@task(name="cache latents", cache_policy=NO_CACHE, persist_result=False)
def cache_latents(run_uid: str, snapshot: str) -> str:
    """The cache's stage key."""
    run = _open[run_uid]
    training = run.recipe.training
    key = cache_key(snapshot, run.base, training_sizing(run.base, training), Wording.of(training))
    request = {"snapshot": snapshot, "training": training.model_dump(mode="json")}
    return on_the_gpu(run, "cache", key, request).key


@task(name="fine-tune", cache_policy=NO_CACHE, persist_result=False)
def fit_adapter(run_uid: str, snapshot: str) -> str:
    """The fine-tuning's stage key."""
    run = _open[run_uid]
    result = on_the_gpu(
        run,
        "fine-tune",
        fine_tune_key(run.recipe, run.base, snapshot),
        {"snapshot": snapshot, "training": run.recipe.training.model_dump(mode="json")},
    )
    if result.outcome == "reused":  # the series of the training that made it belong to this run's record too
        _replay(run, result.product)
    _note_adapters(run, result)
    run.tracker.tags({"adapter_sha256": result.product.facts["sha256"]})
    return result.key


@task(name="evaluate", cache_policy=NO_CACHE, persist_result=False)
def evaluate(run_uid: str, snapshot: str) -> str:
    """The evaluation's stage key."""
    run = _open[run_uid]
    trained = run.results["fine-tune"].product
    contenders = [{"role": "base", "adapter_sha256": None, "step": 0}]
    aliases = _aliases(run)
    champion = champion_of(run.bench, aliases, run.recipe.name, trained.facts["sha256"])
    if champion is not None:
        contenders.append({"role": "champion", "adapter_sha256": champion.adapter_sha256, "step": 0})
    contenders.append(
        {"role": "candidate", "adapter_sha256": trained.facts["sha256"], "step": trained.facts["final_step"]}
    )
    evaluation, promotion = run.recipe.evaluation, run.recipe.promotion
    validation = trained.outputs.get("validation")
    key = evaluate_key(
        run.recipe,
        run.base,
        snapshot,
        adapter_sha256=trained.facts["sha256"],
        champion_sha256=champion.adapter_sha256 if champion else None,
    )
    result = on_the_gpu(
        run,
        "evaluate",
        key,
        {
            "snapshot": snapshot,
            "contenders": contenders,
            "resolution": training_size(run.base, run.recipe.training),
            "evaluation": evaluation.model_dump(mode="json"),
            "promotion": promotion.model_dump(mode="json"),
            "validation": {"sha256": validation.sha256, "bytes": validation.bytes} if validation else None,
            "final_step": trained.facts["final_step"],
        },
    )
    facts = result.product.facts
    run.tracker.evaluation(facts["metrics"], trained.facts["final_step"])
    run.tracker.tags({"gate": facts["gate"]["decision"], "fingerprint": facts["fingerprint"]})
    run.tracker.artifact("gallery/sheet.png", result.product.outputs["sheet"].sha256)
    run.tracker.artifact("gallery/manifest.jsonl", result.product.outputs["gallery"].sha256)
    run.tracker.artifact("evaluation.json", result.product.outputs["report"].sha256)
    return result.key


@task(name="register", cache_policy=NO_CACHE, persist_result=False)
def register(run_uid: str, evaluation: str) -> str:
    """The registered model's URI. A server of ours that died since the run began is started again."""
    run = _open[run_uid]
    _bring_back(run, "mlflow")
    trained, report = run.results["fine-tune"].product, run.results["evaluate"].product
    name, sha256 = run.recipe.name, trained.facts["sha256"]
    key = register_key(run.recipe, adapter_sha256=sha256, evaluation=evaluation)

    def produce() -> Product:
        registration = register_model(
            run.bench,
            run_uid=run_uid,
            name=name,
            base_path=run.base.path,
            checkpoints=_checkpoints(trained),
            final_sha256=sha256,
            metrics=report.facts["metrics"],
            dataset=(name, run.results["curate"].product.facts["digest"]),
            tags={"evaluation_key": evaluation, "gate": report.facts["gate"]["decision"]},
            resolution=training_size(run.base, run.recipe.training),
            num_inference_steps=run.recipe.evaluation.num_inference_steps,
            guidance_scale=run.recipe.evaluation.guidance_scale,
        )
        exported = run.ask(
            {
                "stage": "export",
                "adapter": sha256,
                "run_uid": run_uid,
                "folder": str(run.bench.workspace.exports / name / sha256[:12]),
            }
        )
        return Product(
            {"adapter": trained.outputs["adapter"]},
            {"name": name, "version": registration.version, "uri": registration.uri, "files": exported.facts["files"]},
            items=1,
        )

    def still_there(product: Product) -> bool:
        return registry.registered(run.bench.workspace, name, product.facts["version"])

    result = run.stage("register", key, produce, still_there=still_there)
    _mirror(run, result, evaluation)
    _promote_by_gate(run, result, report)
    return result.product.facts["uri"]


# what the steps share ---------------------------------------------------------------------------------------------


def on_the_gpu(run: OpenRun, stage: str, key: str, request: dict[str, Any]) -> StageResult:
    """A stage of the torch child; the host's one slot is held while it works."""

    body = {"stage": stage, "key": key, "run_uid": run.run_uid, "base": run.recipe.base.model_dump(mode="json")}
    return run.stage(stage, key, lambda: in_the_slot(run, body | request))


def in_the_slot(run: OpenRun, request: dict[str, Any]) -> Product:
    """What the torch child makes of a request, while the host's one slot is held."""
    product = None
    try:
        _bring_back(run, "prefect")
        with concurrency(
            f"gpu:{socket.gethostname()}", strict=True, lease_duration=60, raise_on_lease_renewal_failure=False
        ):
            product = run.ask(request)
            _bring_back(run, "prefect")  # to take the slot back
    except (TransportError, ConcurrencySlotAcquisitionError) as error:
        if product is None:
            raise _prefect_away(error) from error
    except ServiceUnavailable:
        if product is None:
            raise
    return product  # its work is done; a slot that nobody took back falls free when its lease ends


def _bring_back(run: OpenRun, *servers: str) -> None:
    """Start those servers of ours again that died since the run began; one check of health for each that lives."""
    services.adopt_environment(run.bench.workspace, services.ensure_up(run.bench.workspace, servers))


def _prefect_away(error: Exception) -> ServiceUnavailable:
    return ServiceUnavailable(
        f"Prefect does not answer ({error or type(error).__name__}); start it with `safelight up` and run the same"
        " command again, which goes on from the last commit"
    )


def _progress(run: OpenRun, stage: str) -> Any:
    return lambda done, total: run.relay({"event": "progress", "stage": stage, "done": done, "total": total})


def _note_snapshot(run: OpenRun, product: Product) -> None:
    facts = product.facts
    runs.update_run(run.bench.catalog, run.run_uid, snapshot_id=facts["snapshot_id"])
    run.tracker.dataset(
        f"{facts['dataset']}@v{facts['version']}",
        facts["digest"],
        source=", ".join(source.path for source in run.recipe.data.sources),
    )
    run.tracker.tags({"snapshot": facts["digest"], "dataset_version": str(facts["version"])})
    run.tracker.artifact("snapshot/manifest.parquet", product.outputs["manifest"].sha256)
    run.tracker.artifact("snapshot/verdicts.parquet", product.outputs["verdicts"].sha256)


def _describe_captions(run: OpenRun, facts: dict[str, Any]) -> None:
    """Note in the snapshot's profile how the base reads its captions; in the torch child where that takes torch."""
    from components.curation.caption_statistics import note_caption_statistics, noted_statistics
    from components.families.tokens import need_transformers

    of = (facts["snapshot_id"], facts["digest"])
    if noted_statistics(run.bench, *of, run.base, run.recipe.data) is not None:
        return
    if need_transformers(run.base):
        settings = {"base": run.recipe.base.model_dump(mode="json"), "data": run.recipe.data.model_dump(mode="json")}
        run.ask({"stage": "describe", "snapshot_id": of[0], "snapshot": of[1]} | settings)
    else:
        note_caption_statistics(run.bench, *of, run.base, run.recipe.data)


def _replay(run: OpenRun, product: Product) -> None:
    for line in run.bench.store.read(product.outputs["log"].sha256).decode().splitlines():
        entry = json.loads(line)
        step = entry.pop("step")
        run.tracker.metrics(step, entry)
    for name, ref in product.outputs.items():
        if name.startswith("preview-"):
            _, step, index = name.split("-")
            run.tracker.image(f"preview/{index}", ref.sha256, int(step))


def _note_adapters(run: OpenRun, result: StageResult) -> None:
    """A run that only looks at an adapter file leaves an adapter that is known to the training that made it."""
    only_looks = run.recipe.training.max_train_steps == 0
    with run.bench.catalog.write() as session:
        for checkpoint in _checkpoints(result.product):
            if only_looks and session.get(Adapter, checkpoint.sha256) is not None:
                continue
            session.merge(Adapter(sha256=checkpoint.sha256, stage_key=result.key, step=checkpoint.step))


def _checkpoints(trained: Product) -> list[Checkpoint]:
    steps = {
        int(name.removeprefix("adapter-")): ref for name, ref in trained.outputs.items() if name.startswith("adapter-")
    }
    return [Checkpoint(step, ref.sha256) for step, ref in sorted(steps.items())]


def _aliases(run: OpenRun) -> dict[str, int]:
    """The registry's aliases; while MLflow is away, as the catalog last saw them, so that evaluation goes on."""
    try:
        return registry.mirror_versions(run.bench, run.recipe.name)
    except ServiceUnavailable:
        return mirrored_aliases(run.bench, run.recipe.name)


def _mirror(run: OpenRun, result: StageResult, evaluation: str) -> None:
    facts = result.product.facts
    with run.bench.catalog.write() as session:
        if session.get(ModelVersion, (facts["name"], facts["version"])) is None:
            session.add(
                ModelVersion(
                    name=facts["name"],
                    version=facts["version"],
                    run_uid=run.run_uid,
                    adapter_sha256=result.product.outputs["adapter"].sha256,
                    evaluation_key=evaluation,
                    mlflow_uri=facts["uri"],
                    aliases=[],
                )
            )
    registry.mirror_versions(run.bench, run.recipe.name)


def _promote_by_gate(run: OpenRun, result: StageResult, report: Product) -> None:
    from flows.promote import promote

    facts = result.product.facts
    if run.recipe.promotion.policy == "auto" and report.facts["gate"]["decision"] == "promote":
        held = registry.aliases(run.bench.workspace, facts["name"])
        if held.get("champion") != facts["version"]:
            promote(run.bench, facts["name"], facts["version"], by="gate", reason="every check of the gate passed")


# the run card -----------------------------------------------------------------------------------------------------


def publish(run: OpenRun) -> dict[str, Any]:
    """The document that `--json` prints, kept in the catalog and with the run's artifacts."""
    card = run_card(run)
    run.tracker.document("run_card.json", card)
    runs.update_run(run.bench.catalog, run.run_uid, card=card, progress={}, mlflow_run_id=run.tracker.mlflow_run_id)
    with suppress(ServiceUnavailable):
        _bring_back(run, "prefect")  # to hear that the run has ended
    return card


def run_card(run: OpenRun) -> dict[str, Any]:
    facts = {stage: result.product.facts for stage, result in run.results.items()}
    snapshot, trained = facts["curate"], facts.get("fine-tune")
    report, registered = facts.get("evaluate"), facts.get("register")
    address = services.current(run.bench.workspace)
    aliases = registry.aliases(run.bench.workspace, run.recipe.name) if registered else {}
    return {
        "schema": CARD_SCHEMA,
        "status": "completed",
        "error": None,
        "run_uid": run.run_uid,
        "name": run.recipe.name,
        "snapshot": {
            "name": snapshot["dataset"],
            "version": snapshot["version"],
            "digest": snapshot["digest"],
            "kept": snapshot["kept"],
            "rejected": snapshot["rejected"],
            "captions": _caption_statistics(run, snapshot["snapshot_id"]),
        },
        "stages": [stage_line(result) for result in run.results.values()],
        "adapter": {
            "path": (registered["files"] if registered else {}).get("diffusers")
            or str(run.bench.store.path(trained["sha256"])),
            "sha256": trained["sha256"],
            "step": trained["final_step"],
        }
        if trained
        else None,
        "metrics": report["metrics"] if report else {},
        "gate": {"decision": report["gate"]["decision"], "reasons": report["gate"]["reasons"]} if report else None,
        "model": {
            "name": registered["name"],
            "version": registered["version"],
            "aliases": sorted(alias for alias, version in aliases.items() if version == registered["version"]),
        }
        if registered
        else None,
        "urls": {
            "dashboard": f"{address.dashboard_url}/runs?run={run.run_uid}" if address.dashboard_url else None,
            "mlflow": run.tracker.url,
            "prefect": f"{address.prefect_url}/runs/flow-run/{flow_run.id}" if flow_run.id else None,
        },
    }


def _caption_statistics(run: OpenRun, snapshot_id: int) -> dict[str, Any] | None:
    from components.catalog.datasets import get_snapshot
    from components.curation.caption_statistics import NAME

    snapshot = get_snapshot(run.bench.catalog, snapshot_id)
    return snapshot.profile.get(NAME) if snapshot else None


# entry ------------------------------------------------------------------------------------------------------------


@contextmanager
def opened(recipe: Recipe, run_uid: str | None, kind: str = "retrain", *, verify: bool = False) -> Iterator[OpenRun]:
    """A run of this flow run, known to the steps by its uid for the length of the block."""
    tags = {"prefect.flow_run_id": str(flow_run.id)} if flow_run.id else {}
    with (
        stopping_on_sigterm(),
        open_run(recipe, run_uid=run_uid, kind=kind, on_event=_notify, tags=tags, verify=verify) as run,
    ):
        runs.update_run(run.bench.catalog, run.run_uid, prefect_flow_run_id=flow_run.id or None)
        _open[run.run_uid] = run
        try:
            yield run
        finally:
            del _open[run.run_uid]


def _notify(event: dict[str, Any]) -> None:
    for listener in _listeners:
        listener(event)


def retrain_recipe(
    recipe: Recipe,
    *,
    upto: UpTo = "register",
    run_uid: str | None = None,
    verify: bool = False,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Run the flow in this process, with Prefect and MLflow up, and return the run card."""
    with served(on_event):
        return retrain(recipe, upto=upto, run_uid=run_uid, verify=verify)


@contextmanager
def served(on_event: OnEvent | None) -> Iterator[None]:
    """Prefect and MLflow up, and a flow's events relayed, for the length of the block."""
    workspace = Workspace.from_environment().create()
    services.adopt_environment(workspace, services.ensure_up(workspace))
    listeners = [on_event] if on_event else []
    _listeners.extend(listeners)
    try:
        yield
    except TransportError as error:
        raise _prefect_away(error) from error
    finally:
        for listener in listeners:
            _listeners.remove(listener)
