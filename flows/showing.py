"""`safelight show` and `logs`: what is known of a run, an adapter file or a registered model."""

import json
from pathlib import Path
from typing import Any

from sqlalchemy import select

from components.catalog.models import Evaluation, ModelVersion, Promotion, Run, StageRun
from components.errors import BadInput, DamagedArtifact
from components.stages import Bench
from flows.console import Reporter, number, show_card, size
from flows.journal import read_entries

HEADER_LIMIT = 100_000_000  # bytes; what the safetensors library accepts
LOG_FILES = ("run.log", "torch.log")
LONG = 100  # characters; a longer metadata value gets lines of its own
QUIET_KINDS = frozenset({"params", "tags", "metrics", "image", "artifact", "dataset"})


def show_run(reporter: Reporter, bench: Bench, run: Run) -> None:
    """A run with its stages, metrics and links."""
    with bench.catalog.read() as session:
        rows = session.scalars(select(StageRun).where(StageRun.run_uid == run.run_uid)).all()
    stages = [
        {
            "name": row.stage,
            "key": row.key,
            "outcome": row.outcome,
            "seconds": row.seconds,
            "items": row.items,
            "bytes": row.bytes,
        }
        for row in rows
    ]
    card = {"stages": stages} | run.card | {"status": run.status, "error": run.error}
    document = {
        "schema": 1,
        "status": "completed",
        "run": {
            "run_uid": run.run_uid,
            "name": run.name,
            "kind": run.kind,
            "status": run.status,
            "error": run.error,
            "created_at": run.created_at,
            "ended_at": run.ended_at,
            "host": run.host,
            "pid": run.pid,
            "git_commit": run.git_commit,
            "mlflow_run_id": run.mlflow_run_id,
            "prefect_flow_run_id": run.prefect_flow_run_id,
            "progress": run.progress,
            "recipe": run.recipe,
            "stages": stages,
            "card": run.card,
        },
    }

    def show() -> None:
        reporter.say(f"run {run.run_uid}  {run.name}  {run.kind}")
        reporter.say(
            f"began {run.created_at:%Y-%m-%d %H:%M:%S} UTC on {run.host}"
            + (f", ended {run.ended_at:%H:%M:%S}" if run.ended_at else f", {run.progress}")
        )
        show_card(reporter, card)

    reporter.finish(document, show)


def show_file(reporter: Reporter, path: Path) -> None:
    """Every metadata entry of an adapter file, and what its tensors are; no tensor is read."""
    header = read_safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    tensors = {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in header.items()}
    parameters = sum(_product(entry["shape"]) for entry in tensors.values())

    def show() -> None:
        reporter.say(f"{path}  {size(path.stat().st_size)}, {len(tensors)} tensors, {parameters} parameters")
        entries = sorted(metadata.items())
        reporter.table(("metadata", "value"), [entry for entry in entries if len(entry[1]) <= LONG])
        for key, value in entries:
            if len(value) > LONG:
                reporter.say(f"{key}\n  {value}")

    reporter.finish(
        {
            "schema": 1,
            "status": "completed",
            "file": str(path),
            "bytes": path.stat().st_size,
            "parameters": parameters,
            "metadata": metadata,
            "tensors": tensors,
        },
        show,
    )


def show_model(reporter: Reporter, bench: Bench, what: str) -> None:
    """A registered model's versions, or one of them in full."""
    name = what.partition("@")[0].partition("/")[0]
    versions = versions_of(bench, name)
    if name != what:
        versions = [find_version(bench, what)]
    with bench.catalog.read() as session:
        verdicts = {
            key: (metrics, verdict)
            for key, metrics, verdict in session.execute(
                select(Evaluation.key, Evaluation.metrics, Evaluation.verdict).where(
                    Evaluation.key.in_([version.evaluation_key for version in versions])
                )
            )
        }
        moves = session.scalars(select(Promotion).where(Promotion.name == name).order_by(Promotion.id)).all()
    documents: list[dict[str, Any]] = [
        {
            "name": v.name,
            "version": v.version,
            "aliases": v.aliases,
            "run_uid": v.run_uid,
            "uri": v.mlflow_uri,
            "adapter_sha256": v.adapter_sha256,
            "created_at": v.created_at,
            "metrics": verdicts.get(v.evaluation_key, ({}, {}))[0],
            "gate": verdicts.get(v.evaluation_key, ({}, {}))[1],
        }
        for v in versions
    ]

    def show() -> None:
        reporter.say(name, "bold")
        reporter.table(
            ("version", "aliases", "gate", "registered", "run", "adapter"),
            [
                (
                    v["version"],
                    ", ".join(v["aliases"]),
                    v["gate"].get("decision"),
                    f"{v['created_at']:%Y-%m-%d %H:%M}",
                    v["run_uid"],
                    v["adapter_sha256"][:12],
                )
                for v in documents
            ],
        )
        if len(documents) == 1 and documents[0]["metrics"]:
            reporter.say()
            reporter.table(
                ("metric", "candidate", "base"),
                [
                    (metric, number(values.get("candidate")), number(values.get("base")))
                    for metric, values in documents[0]["metrics"].items()
                ],
                right=("candidate", "base"),
            )
        for move in moves:
            reporter.say(
                f"{move.created_at:%Y-%m-%d %H:%M}  version {move.version} became champion, decided by"
                f" {move.decided_by}: {move.reason}",
                "dim",
            )

    reporter.finish(
        {
            "schema": 1,
            "status": "completed",
            "model": name,
            "versions": documents,
            "promotions": [
                {
                    "version": m.version,
                    "previous": m.previous_version,
                    "by": m.decided_by,
                    "reason": m.reason,
                    "created_at": m.created_at,
                }
                for m in moves
            ],
        },
        show,
    )


def versions_of(bench: Bench, name: str) -> list[ModelVersion]:
    """A model's versions, newest first. Raises BadInput when there is no such model, or run, or file."""
    with bench.catalog.read() as session:
        versions = list(
            session.scalars(select(ModelVersion).where(ModelVersion.name == name).order_by(ModelVersion.version.desc()))
        )
        if not versions:
            names = ", ".join(sorted(set(session.scalars(select(ModelVersion.name))))) or "none"
            raise BadInput(
                f"{name!r} is no run, adapter file or registered model; models: {names}; `safelight runs` lists runs"
            )
    return versions


def find_version(bench: Bench, what: str) -> ModelVersion:
    """The version that NAME, NAME@ALIAS or NAME/VERSION means; NAME alone: the champion, else the newest."""
    name, at, alias = what.partition("@")
    name, slash, number_text = name.partition("/")
    versions = versions_of(bench, name)
    if at or not slash:
        held = [version for version in versions if (alias or "champion") in version.aliases]
        if at and not held:
            aliases = sorted({word for version in versions for word in version.aliases})
            raise BadInput(f"{name} has no alias {alias!r}; there are: {', '.join(aliases) or 'none'}")
        return (held or versions)[0]
    for version in versions:
        if str(version.version) == number_text:
            return version
    raise BadInput(f"{name} has no version {number_text}; there are: {', '.join(str(v.version) for v in versions)}")


def log_lines(bench: Bench, run_uid: str) -> list[str]:
    """What a run's processes wrote, and the turning points of its journal."""
    folder = bench.workspace.run_dir(run_uid)
    lines = []
    if (folder / "journal.jsonl").exists():
        lines += [
            f"{entry.kind}: {json.dumps(entry.body, ensure_ascii=False)}"
            for entry in read_entries(folder / "journal.jsonl")
            if entry.kind not in QUIET_KINDS
        ]
    for name in LOG_FILES:
        if (folder / name).exists():
            lines += (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
    return lines


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor entries and `__metadata__`. Raises BadInput or DamagedArtifact."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, path.stat().st_size):
                raise DamagedArtifact(
                    f"{path}: is no safetensors file (its header would be {length} bytes); fetch it again"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (ValueError, UnicodeDecodeError):
        raise DamagedArtifact(f"{path}: its header is not readable; fetch it again") from None
    if not isinstance(header, dict):
        raise DamagedArtifact(f"{path}: its header is not readable; fetch it again")
    return header


def _product(shape: list[int]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result
