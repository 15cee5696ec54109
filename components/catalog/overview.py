"""What is going on: live and past runs, what waits for a person, registered models. Read-only and typed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from components.catalog.database import Catalog
from components.catalog.models import (
    Evaluation,
    Generation,
    ModelVersion,
    Promotion,
    Review,
    Run,
    Snapshot,
    StageRun,
    now,
)

SILENT_AFTER = timedelta(minutes=5)  # a run in state running whose heartbeat is older shows no sign of life
THUMBS = 6


@dataclass(frozen=True, slots=True)
class Metric:
    """One measure of a gallery. None is "not measured"; `low` and `high` bound the difference candidate - reference."""

    name: str
    candidate: float | None
    base: float | None
    champion: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int | None
    better: str  # "lower", "higher" or "" when nobody said
    against: str  # what the difference is to: "base", "champion", or "" when it is the candidate's own interval


@dataclass(frozen=True, slots=True)
class Reason:
    outcome: str  # pass, hold, reject, or "" when the gate did not say
    sentence: str


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate's verdict; `decision` is promote, hold, reject, or "" where no gate has spoken."""

    decision: str = ""
    reasons: tuple[Reason, ...] = ()

    @property
    def why(self) -> str:
        """The first sentence with the verdict's own outcome, else the first of all; "" where no gate has spoken."""
        deciding = [reason for reason in self.reasons if reason.outcome == self.decision]
        return next((reason.sentence for reason in (*deciding, *self.reasons)), "")


@dataclass(frozen=True, slots=True)
class Thumb:
    image_sha256: str
    prompt: str


@dataclass(frozen=True, slots=True)
class LiveRun:
    """A run in state running; `silent` when its heartbeat stopped."""

    run_uid: str
    name: str
    kind: str
    stage: str | None
    done: int | None
    total: int | None
    finished_stages: tuple[str, ...]
    created_at: datetime
    heartbeat_at: datetime
    silent: bool


@dataclass(frozen=True, slots=True)
class RunRow:
    """A line of the run table."""

    run_uid: str
    name: str
    kind: str
    status: str
    created_at: datetime
    ended_at: datetime | None
    error: str | None
    dataset: str | None
    dataset_version: int | None
    evaluation_key: str | None
    gate: Gate
    metrics: tuple[Metric, ...]
    thumbs: tuple[Thumb, ...]


@dataclass(frozen=True, slots=True)
class RunTable:
    """A page of runs, newest first; pass `next_before` as `before` for the one after it."""

    rows: tuple[RunRow, ...]
    next_before: str | None


@dataclass(frozen=True, slots=True)
class StageLine:
    stage: str
    key: str
    outcome: str
    seconds: float
    items: int
    bytes: int


@dataclass(frozen=True, slots=True)
class RunDetail:
    """Everything that the catalog knows of one run."""

    row: RunRow
    stages: tuple[StageLine, ...]
    host: str
    git_commit: str | None
    heartbeat_at: datetime
    progress: dict[str, Any]
    recipe: dict[str, Any]
    card: dict[str, Any]
    prefect_flow_run_id: str | None
    mlflow_run_id: str | None
    snapshot_id: int | None
    models: tuple[tuple[str, int], ...]  # (name, version)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A challenger about which nobody has decided yet."""

    name: str
    version: int
    run_uid: str
    evaluation_key: str
    gate: Gate
    created_at: datetime
    pictures: int  # of the candidate
    rated: int  # of them, by anyone
    flagged: int
    thumbs: tuple[Thumb, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """One line of the audit trail of a model's champion alias."""

    version: int
    previous_version: int | None
    decided_by: str
    reason: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A registered version with what is known about it."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_uid: str
    evaluation_key: str
    adapter_sha256: str
    mlflow_uri: str
    created_at: datetime
    gate: Gate
    metrics: tuple[Metric, ...]
    thumbs: tuple[Thumb, ...]
    files: tuple[tuple[str, str], ...]  # (what, path) as the run card names them


def live_runs(catalog: Catalog, *, at: datetime | None = None) -> tuple[LiveRun, ...]:
    """Runs in state running, oldest first, as they look at a moment (default: now)."""
    with catalog.read() as session:
        runs = list(session.scalars(select(Run).where(Run.status == "running").order_by(Run.run_uid)))
        finished: dict[str, list[str]] = {}
        for run_uid, stage in session.execute(
            select(StageRun.run_uid, StageRun.stage).where(StageRun.run_uid.in_([run.run_uid for run in runs]))
        ):
            finished.setdefault(run_uid, []).append(stage)
    return tuple(_live(run, finished.get(run.run_uid, ()), at or now()) for run in runs)


def run_table(
    catalog: Catalog, *, before: str | None = None, limit: int = 20, name: str | None = None, status: str | None = None
) -> RunTable:
    """A page of runs, newest first: those with a uid below `before`, optionally of one name or status."""
    query = select(Run).order_by(Run.run_uid.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(Run.run_uid < before)
    if name is not None:
        query = query.where(Run.name == name)
    if status is not None:
        query = query.where(Run.status == status)
    with catalog.read() as session:
        runs = list(session.scalars(query))
        rows = _run_rows(session, runs[:limit])
    return RunTable(rows, rows[-1].run_uid if len(runs) > limit else None)


def run_names(catalog: Catalog) -> tuple[str, ...]:
    """Every name that a run ever had, in alphabetical order."""
    with catalog.read() as session:
        return tuple(session.scalars(select(Run.name).distinct().order_by(Run.name)))


def run_detail(catalog: Catalog, run_uid: str) -> RunDetail | None:
    """One run, or None when the catalog holds no such uid."""
    with catalog.read() as session:
        run = session.get(Run, run_uid)
        if run is None:
            return None
        stages = session.scalars(select(StageRun).where(StageRun.run_uid == run_uid))
        models = session.execute(
            select(ModelVersion.name, ModelVersion.version)
            .where(ModelVersion.run_uid == run_uid)
            .order_by(ModelVersion.version)
        )
        return RunDetail(
            row=_run_rows(session, [run])[0],
            stages=tuple(StageLine(s.stage, s.key, s.outcome, s.seconds, s.items, s.bytes) for s in stages),
            host=run.host,
            git_commit=run.git_commit,
            heartbeat_at=run.heartbeat_at,
            progress=run.progress,
            recipe=run.recipe,
            card=run.card,
            prefect_flow_run_id=run.prefect_flow_run_id,
            mlflow_run_id=run.mlflow_run_id,
            snapshot_id=run.snapshot_id,
            models=tuple((name, version) for name, version in models),
        )


def waiting(catalog: Catalog) -> tuple[Waiting, ...]:
    """Challengers without a decision, newest first."""
    with catalog.read() as session:
        versions = [version for version in session.scalars(_newest_versions()) if "challenger" in version.aliases]
        decided = {(name, version) for name, version in session.execute(select(Promotion.name, Promotion.version))}
        versions = [version for version in versions if (version.name, version.version) not in decided]
        keys = [version.evaluation_key for version in versions]
        evaluations = _evaluations(session, keys)
        thumbs = _thumbs(session, keys)
        return tuple(_waiting(session, version, evaluations, thumbs) for version in versions)


def model_names(catalog: Catalog) -> tuple[str, ...]:
    """Registered models in alphabetical order."""
    with catalog.read() as session:
        return tuple(session.scalars(select(ModelVersion.name).distinct().order_by(ModelVersion.name)))


def model_cards(catalog: Catalog, name: str, *, below: int | None = None, limit: int = 12) -> tuple[ModelCard, ...]:
    """Versions of a model, newest first: those below version `below`."""
    query = select(ModelVersion).where(ModelVersion.name == name).order_by(ModelVersion.version.desc()).limit(limit)
    if below is not None:
        query = query.where(ModelVersion.version < below)
    with catalog.read() as session:
        versions = list(session.scalars(query))
        keys = [version.evaluation_key for version in versions]
        evaluations, thumbs = _evaluations(session, keys), _thumbs(session, keys)
        made_by = select(Run.run_uid, Run.card).where(Run.run_uid.in_([version.run_uid for version in versions]))
        cards = {row.run_uid: row.card for row in session.execute(made_by)}
    return tuple(
        ModelCard(
            v.name,
            v.version,
            tuple(map(str, v.aliases)),
            v.run_uid,
            v.evaluation_key,
            v.adapter_sha256,
            v.mlflow_uri,
            v.created_at,
            _gate(evaluations.get(v.evaluation_key)),
            _metrics(evaluations.get(v.evaluation_key)),
            thumbs.get(v.evaluation_key, ()),
            _files(cards.get(v.run_uid, {})),
        )
        for v in versions
    )


def moves(catalog: Catalog, name: str, *, limit: int = 20) -> tuple[Move, ...]:
    """The newest decisions about a model, newest first."""
    with catalog.read() as session:
        rows = session.scalars(
            select(Promotion).where(Promotion.name == name).order_by(Promotion.id.desc()).limit(limit)
        )
        return tuple(Move(r.version, r.previous_version, r.decided_by, r.reason, r.created_at) for r in rows)


def parse_gate(verdict: Any) -> Gate:
    """A gate from its stored document {"decision", "reasons": [sentence | {"outcome", "sentence"}]}."""
    if not isinstance(verdict, dict):
        return Gate()
    reasons = verdict.get("reasons") or ()
    return Gate(
        str(verdict.get("decision") or ""),
        tuple(
            Reason(str(reason.get("outcome") or ""), str(reason.get("sentence") or reason.get("code") or ""))
            if isinstance(reason, dict)
            else Reason("", str(reason))
            for reason in reasons
        ),
    )


def parse_metrics(document: Any) -> tuple[Metric, ...]:
    """Metrics from their stored document {name: {"candidate", "base", "champion", "difference": {...}, ...}}."""
    if not isinstance(document, dict):
        return ()
    return tuple(_metric(str(name), body) for name, body in document.items() if isinstance(body, dict))


def _metric(name: str, body: dict[str, Any]) -> Metric:
    difference = body.get("difference")
    difference = difference if isinstance(difference, dict) else {}
    n = body.get("n")
    return Metric(
        name,
        _number(body.get("candidate")),
        _number(body.get("base")),
        _number(body.get("champion")),
        _number(difference.get("value")),
        _number(difference.get("low")),
        _number(difference.get("high")),
        n if isinstance(n, int) else None,
        str(body.get("better") or ""),
        against if (against := body.get("against")) in ("base", "champion") else "",
    )


def _number(value: Any) -> float | None:
    """A finite or infinite float; None for anything that is no number (metrics also come as {"value", ...})."""
    if isinstance(value, dict):
        value = value.get("value")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _live(run: Run, finished: Sequence[str], at: datetime) -> LiveRun:
    progress = run.progress
    return LiveRun(
        run.run_uid,
        run.name,
        run.kind,
        progress.get("stage"),
        progress.get("done"),
        progress.get("total"),
        tuple(finished),
        run.created_at,
        run.heartbeat_at,
        at - run.heartbeat_at > SILENT_AFTER,
    )


def _run_rows(session: Session, runs: Sequence[Run]) -> tuple[RunRow, ...]:
    uids = [run.run_uid for run in runs]
    evaluated = select(StageRun.run_uid, StageRun.key).where(StageRun.run_uid.in_(uids), StageRun.stage == "evaluate")
    keys = {row.run_uid: row.key for row in session.execute(evaluated)}
    evaluations = _evaluations(session, keys.values())
    thumbs = _thumbs(session, evaluations)
    snapshots = {
        s.id: s
        for s in session.scalars(
            select(Snapshot).where(Snapshot.id.in_([run.snapshot_id for run in runs if run.snapshot_id is not None]))
        )
    }
    rows = []
    for run in runs:
        key = keys.get(run.run_uid)
        snapshot = snapshots.get(run.snapshot_id) if run.snapshot_id is not None else None
        rows.append(
            RunRow(
                run.run_uid,
                run.name,
                run.kind,
                run.status,
                run.created_at,
                run.ended_at,
                run.error,
                snapshot.dataset if snapshot else None,
                snapshot.version if snapshot else None,
                key if key in evaluations else None,
                _gate(evaluations.get(key)),
                _metrics(evaluations.get(key)),
                thumbs.get(key, ()),
            )
        )
    return tuple(rows)


def _evaluations(session: Session, keys: Iterable[str]) -> dict[str | None, Evaluation]:
    return {row.key: row for row in session.scalars(select(Evaluation).where(Evaluation.key.in_(list(keys))))}


def _gate(evaluation: Evaluation | None) -> Gate:
    return parse_gate(evaluation.verdict) if evaluation else Gate()


def _metrics(evaluation: Evaluation | None) -> tuple[Metric, ...]:
    return parse_metrics(evaluation.metrics) if evaluation else ()


def _thumbs(session: Session, keys: Iterable[str | None]) -> dict[str | None, tuple[Thumb, ...]]:
    """The candidate's pictures of the first prompts at its last step, per evaluation."""
    rows = session.execute(
        select(Generation.evaluation_key, Generation.prompt_index, Generation.image_sha256, Generation.prompt)
        .where(
            Generation.evaluation_key.in_(list(keys)), Generation.role == "candidate", Generation.prompt_index < THUMBS
        )
        .order_by(Generation.evaluation_key, Generation.prompt_index, Generation.step.desc(), Generation.seed)
    )
    first: dict[str, dict[int, Thumb]] = {}
    for key, index, sha256, prompt in rows:
        first.setdefault(key, {}).setdefault(index, Thumb(sha256, prompt))
    return {key: tuple(by_prompt.values()) for key, by_prompt in first.items()}


def _newest_versions() -> Select[tuple[ModelVersion]]:
    return select(ModelVersion).order_by(ModelVersion.created_at.desc(), ModelVersion.version.desc()).limit(100)


def _waiting(
    session: Session,
    version: ModelVersion,
    evaluations: dict[str | None, Evaluation],
    thumbs: dict[str | None, tuple[Thumb, ...]],
) -> Waiting:
    candidate = (Generation.evaluation_key == version.evaluation_key, Generation.role == "candidate")
    pictures = session.scalar(select(func.count()).select_from(Generation).where(*candidate)) or 0
    reviewed = select(func.count(Review.generation_id.distinct())).join(Generation).where(*candidate, Review.value > 0)
    return Waiting(
        version.name,
        version.version,
        version.run_uid,
        version.evaluation_key,
        _gate(evaluations.get(version.evaluation_key)),
        version.created_at,
        pictures,
        session.scalar(reviewed.where(Review.kind == "stars")) or 0,
        session.scalar(reviewed.where(Review.kind == "flag")) or 0,
        thumbs.get(version.evaluation_key, ()),
    )


def _files(card: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Paths that a run card names: the adapter, and exports where they are listed."""
    adapter = card.get("adapter")
    named = [("adapter file", adapter.get("path"))] if isinstance(adapter, dict) else []
    exports = card.get("exports")
    named += list(exports.items()) if isinstance(exports, dict) else []
    return tuple((str(what), str(path)) for what, path in named if path)
