"""Reviews: append-only acts of people on generations. The newest act of each kind by each reviewer counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from components.catalog.database import Catalog
from components.catalog.models import Generation, Review
from components.errors import BadInput

Kind = Literal["stars", "flag", "comment"]

MAX_REVIEWER, MAX_KEY, MAX_COMMENT = 80, 64, 2000  # characters
HIGHEST = {"stars": 5, "flag": 1}


class ReviewConflict(BadInput):
    """An idempotency key came back with another act than the one it was first used for."""


class UnknownGeneration(BadInput):
    """A review of a picture that the catalog does not hold."""


@dataclass(frozen=True, slots=True)
class Act:
    """One recorded act. `value` is 0-5 for stars (0 clears) and 0 or 1 for a flag; `text` is a comment's."""

    id: int
    generation_id: int
    reviewer: str
    kind: str
    value: int | None
    text: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Comment:
    reviewer: str
    text: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Standing:
    """What people have said about one generation so far, as one reviewer sees it."""

    my_stars: int = 0  # 0: not rated
    my_flag: bool = False
    raters: int = 0  # reviewers whose newest rating is above 0
    mean_stars: float | None = None  # None: nobody rated
    flags: int = 0  # reviewers whose flag stands
    comments: tuple[Comment, ...] = ()


def append(
    catalog: Catalog,
    *,
    generation_id: int,
    reviewer: str,
    kind: str,
    value: int | None = None,
    text: str | None = None,
    key: str,
) -> Act:
    """Record an act. The same (reviewer, key) with the same body returns the first row and writes nothing.

    Raises BadInput for an impossible act, UnknownGeneration, ReviewConflict for a reused key with another body.
    """
    reviewer, text = reviewer.strip(), text.strip() if text else None
    _check(reviewer, kind, value, text, key)
    try:
        with catalog.write() as session:
            if (known := _recorded(session, reviewer, key)) is None:
                if session.get(Generation, generation_id) is None:
                    raise UnknownGeneration(f"generation {generation_id} is not in the catalog; reload the page")
                known = Review(
                    generation_id=generation_id,
                    reviewer=reviewer,
                    kind=kind,
                    value=value,
                    text=text,
                    idempotency_key=key,
                )
                session.add(known)
                session.flush()
            act = _act(known)
    except IntegrityError:  # another process recorded this key between our look and our insert (PostgreSQL)
        with catalog.read() as session:
            if (known := _recorded(session, reviewer, key)) is None:
                raise
            act = _act(known)
    if (act.generation_id, act.kind, act.value, act.text) != (generation_id, kind, value, text):
        raise ReviewConflict(f"idempotency key {key!r} was already used for another act; send this one under a new key")
    return act


def standings(session: Session, generation_ids: Iterable[int], *, reviewer: str) -> dict[int, Standing]:
    """What stands for each of these generations; one that nobody touched is absent."""
    rows = session.scalars(select(Review).where(Review.generation_id.in_(list(generation_ids))).order_by(Review.id))
    acts: dict[int, list[Review]] = {}
    for row in rows:
        acts.setdefault(row.generation_id, []).append(row)
    return {generation_id: _standing(rows, reviewer) for generation_id, rows in acts.items()}


def standing(catalog: Catalog, generation_id: int, *, reviewer: str) -> Standing:
    """What stands for one generation."""
    with catalog.read() as session:
        return standings(session, [generation_id], reviewer=reviewer).get(generation_id, Standing())


def _standing(acts: list[Review], reviewer: str) -> Standing:
    newest = {(act.reviewer, act.kind): act.value or 0 for act in acts if act.kind != "comment"}
    ratings = [value for (_, kind), value in newest.items() if kind == "stars" and value]
    return Standing(
        my_stars=newest.get((reviewer, "stars"), 0),
        my_flag=bool(newest.get((reviewer, "flag"), 0)),
        raters=len(ratings),
        mean_stars=sum(ratings) / len(ratings) if ratings else None,
        flags=sum(1 for (_, kind), value in newest.items() if kind == "flag" and value),
        comments=tuple(Comment(act.reviewer, act.text or "", act.created_at) for act in acts if act.kind == "comment"),
    )


def _recorded(session: Session, reviewer: str, key: str) -> Review | None:
    return session.scalar(select(Review).where(Review.reviewer == reviewer, Review.idempotency_key == key))


def _act(row: Review) -> Act:
    return Act(row.id, row.generation_id, row.reviewer, row.kind, row.value, row.text, row.created_at)


def _check(reviewer: str, kind: str, value: int | None, text: str | None, key: str) -> None:
    if not 1 <= len(reviewer) <= MAX_REVIEWER:
        raise BadInput(f"reviewer has {len(reviewer)} characters, expected 1 to {MAX_REVIEWER}; enter your name")
    if not 8 <= len(key) <= MAX_KEY:
        raise BadInput(f"idempotency key has {len(key)} characters, expected 8 to {MAX_KEY}")
    if kind not in get_args(Kind):
        raise BadInput(f"kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
    if kind == "comment":
        if value is not None or not text or len(text) > MAX_COMMENT:
            raise BadInput(f"a comment has a text of 1 to {MAX_COMMENT} characters and no value")
    elif text is not None or isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= HIGHEST[kind]:
        raise BadInput(f"{kind} has no text and a whole value from 0 to {HIGHEST[kind]}, found {value!r}")
