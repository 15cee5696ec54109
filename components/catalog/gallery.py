"""The board of an evaluation: its pictures by prompt, seed, role and step. Read-only, typed, a page at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session, aliased

from components.catalog.database import Catalog
from components.catalog.models import Evaluation, Generation, Review, Run, StageRun
from components.catalog.overview import Gate, Metric, parse_gate, parse_metrics
from components.catalog.reviews import Standing, standings

Role = Literal["base", "champion", "candidate"]
ROLES: tuple[Role, ...] = ("base", "champion", "candidate")
Show = Literal["all", "unrated", "flagged"]


@dataclass(frozen=True, slots=True)
class EvaluationHead:
    """An evaluation as a list entry."""

    key: str
    run_uid: str
    name: str  # of the run that first produced it
    created_at: datetime
    decision: str  # of the gate; "" where it has not spoken


@dataclass(frozen=True, slots=True)
class Axes:
    """What a board can be cut along."""

    roles: tuple[Role, ...]
    steps: tuple[int, ...]  # of the candidate's checkpoints
    takes: int  # most seeds that any prompt was drawn with
    prompts: int
    champion_step: int | None


@dataclass(frozen=True, slots=True)
class EvaluationDetail:
    head: EvaluationHead
    axes: Axes
    gate: Gate
    metrics: tuple[Metric, ...]
    copy_threshold: float  # a picture more similar than this to a training picture is a near copy
    adapter_sha256: str


@dataclass(frozen=True, slots=True)
class Shot:
    """One generation as a cell of the board."""

    id: int
    role: str
    step: int
    seed: int
    prompt: str
    image_sha256: str
    metrics: dict[str, Any]
    standing: Standing


@dataclass(frozen=True, slots=True)
class BoardRow:
    """One prompt at one seed; a role that was not drawn is absent from `shots`."""

    prompt_index: int
    prompt: str
    group: str | None
    seed: int
    shots: dict[str, Shot]


@dataclass(frozen=True, slots=True)
class Board:
    """A page of rows in prompt order; `next_from` and `previous_from` are the first prompts of its neighbours."""

    rows: tuple[BoardRow, ...]
    prompts: int  # that match, over all pages
    previous_from: int | None
    next_from: int | None


def evaluations(catalog: Catalog, *, limit: int = 50) -> tuple[EvaluationHead, ...]:
    """The newest evaluations that hold pictures, newest first."""
    drawn = select(Generation.id).where(Generation.evaluation_key == Evaluation.key).exists()
    query = _heads().where(drawn).order_by(Evaluation.created_at.desc(), Evaluation.key).limit(limit)
    with catalog.read() as session:
        return tuple(_head(*row) for row in session.execute(query))


def evaluation_of_run(catalog: Catalog, run_uid: str) -> str | None:
    """The evaluation that a run made or adopted."""
    with catalog.read() as session:
        return session.scalar(select(StageRun.key).where(StageRun.run_uid == run_uid, StageRun.stage == "evaluate"))


def evaluation_detail(catalog: Catalog, key: str) -> EvaluationDetail | None:
    """One evaluation, or None when the catalog holds no such key."""
    with catalog.read() as session:
        row = session.execute(_heads().where(Evaluation.key == key)).first()
        if row is None:
            return None
        evaluation = row[0]
        return EvaluationDetail(
            _head(*row),
            _axes(session, key),
            parse_gate(evaluation.verdict),
            parse_metrics(evaluation.metrics),
            _copy_threshold(evaluation.metrics),
            evaluation.adapter_sha256,
        )


def board(
    catalog: Catalog,
    key: str,
    *,
    reviewer: str,
    step: int | None = None,
    take: int | None = 1,
    show: Show = "all",
    search: str = "",
    start: int = 0,
    prompts_per_page: int = 20,
) -> Board:
    """A page of an evaluation's board, beginning with prompt index `start`.

    `step` chooses the candidate's checkpoint (None: the last); `take` the n-th seed of each prompt (None: all
    of them). `show` keeps prompts whose candidate this reviewer has not rated, or that anybody flagged.
    """
    with catalog.read() as session:
        if step is None:
            step = session.scalar(
                select(func.max(Generation.step)).where(
                    Generation.evaluation_key == key, Generation.role == "candidate"
                )
            )
        cells = _cells(key, step, take)
        wanted = select(cells.prompt_index).distinct().where(*_filters(cells, show, search, reviewer))
        total = session.scalar(select(func.count()).select_from(wanted.subquery())) or 0
        page = list(
            session.scalars(
                wanted.where(cells.prompt_index >= start).order_by(cells.prompt_index).limit(prompts_per_page + 1)
            )
        )
        before = list(
            session.scalars(
                wanted.where(cells.prompt_index < start).order_by(cells.prompt_index.desc()).limit(prompts_per_page)
            )
        )
        shown = page[:prompts_per_page]
        rows = session.scalars(
            select(cells).where(cells.prompt_index.in_(shown)).order_by(cells.prompt_index, cells.seed)
        ).all()
        said = standings(session, [row.id for row in rows], reviewer=reviewer)
    return Board(
        _board_rows(rows, said),
        total,
        before[-1] if before else None,
        page[prompts_per_page] if len(page) > prompts_per_page else None,
    )


def _heads() -> Select[Any]:
    return select(Evaluation, Run.name).outerjoin(Run, Run.run_uid == Evaluation.run_uid)


def _head(evaluation: Evaluation, name: str | None) -> EvaluationHead:
    return EvaluationHead(
        evaluation.key,
        evaluation.run_uid,
        name or "a run that is gone",
        evaluation.created_at,
        parse_gate(evaluation.verdict).decision,
    )


def _copy_threshold(metrics: dict[str, Any]) -> float:
    rate = metrics.get("copy_rate")
    limit = rate.get("threshold") if isinstance(rate, dict) else None
    return float(limit) if isinstance(limit, int | float) else float("inf")


def _axes(session: Session, key: str) -> Axes:
    mine = Generation.evaluation_key == key
    found = session.execute(select(Generation.role, Generation.step).where(mine).distinct()).all()
    roles, champion_steps = {role for role, _ in found}, [step for role, step in found if role == "champion"]
    per_prompt = (
        select(func.count(Generation.seed.distinct()).label("takes"))
        .where(mine)
        .group_by(Generation.prompt_index)
        .subquery()
    )
    takes, prompts = session.execute(select(func.max(per_prompt.c.takes), func.count())).one()
    return Axes(
        tuple(role for role in ROLES if role in roles),
        tuple(sorted(step for role, step in found if role == "candidate")),
        takes or 0,
        prompts,
        champion_steps[0] if champion_steps else None,
    )


def _cells(key: str, step: int | None, take: int | None) -> Any:
    """The generations of a board: every role, the candidate at one step, each prompt at its `take`-th seed."""
    ordinal = func.dense_rank().over(partition_by=Generation.prompt_index, order_by=Generation.seed).label("take")
    at_step = or_(Generation.role != "candidate", Generation.step == step)
    ranked = select(Generation, ordinal).where(Generation.evaluation_key == key, at_step).subquery()
    chosen = select(ranked) if take is None else select(ranked).where(ranked.c.take == take)
    return aliased(Generation, chosen.subquery())


def _filters(cells: Any, show: Show, search: str, reviewer: str) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if search.strip():
        found.append(cells.prompt.icontains(search.strip(), autoescape=True))
    if show == "unrated":
        rated = _newest_value(cells, "stars", Review.reviewer == reviewer)
        found += [cells.role == "candidate", func.coalesce(rated, 0) == 0]
    if show == "flagged":
        later = aliased(Review)
        overruled = (
            select(later.id)
            .where(
                later.generation_id == Review.generation_id,
                later.kind == "flag",
                later.reviewer == Review.reviewer,
                later.id > Review.id,
            )
            .exists()
        )
        found.append(
            select(Review.id)
            .where(Review.generation_id == cells.id, Review.kind == "flag", Review.value == 1, ~overruled)
            .exists()
        )
    return found


def _newest_value(cells: Any, kind: str, by: ColumnElement[bool]) -> Any:
    return (
        select(Review.value)
        .where(Review.generation_id == cells.id, Review.kind == kind, by)
        .order_by(Review.id.desc())
        .limit(1)
        .scalar_subquery()
    )


def _board_rows(generations: Sequence[Generation], said: dict[int, Standing]) -> tuple[BoardRow, ...]:
    rows: dict[tuple[int, int], BoardRow] = {}
    for g in generations:
        row = rows.setdefault((g.prompt_index, g.seed), BoardRow(g.prompt_index, g.prompt, g.group, g.seed, {}))
        row.shots[g.role] = Shot(
            g.id, g.role, g.step, g.seed, g.prompt, g.image_sha256, g.metrics, said.get(g.id, Standing())
        )
    return tuple(rows.values())
