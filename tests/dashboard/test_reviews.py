"""Reviews are append-only, idempotent per (reviewer, key), and the newest act of each kind counts."""

import pytest
from sqlalchemy import func, select

from components.catalog import gallery, reviews
from components.catalog.models import Review
from components.errors import BadInput
from tests.dashboard.seed import Seeded


def first_candidate(seeded: Seeded, reviewer: str = "Mia") -> gallery.Shot:
    board = gallery.board(seeded.bench.catalog, seeded.evaluation_key, reviewer=reviewer)
    return board.rows[-1].shots["candidate"]


def count(seeded: Seeded) -> int:
    with seeded.bench.catalog.read() as session:
        return session.scalar(select(func.count()).select_from(Review)) or 0


def test_the_same_act_sent_twice_is_stored_once(writable: Seeded):
    shot, before = first_candidate(writable), count(writable)
    act = {"generation_id": shot.id, "reviewer": "Mia", "kind": "stars", "value": 4, "key": "key-0001"}
    first, second = (reviews.append(writable.bench.catalog, **act) for _ in range(2))
    assert first == second
    assert count(writable) == before + 1


def test_a_key_reused_for_another_act_is_a_conflict_and_changes_nothing(writable: Seeded):
    shot = first_candidate(writable)
    reviews.append(writable.bench.catalog, generation_id=shot.id, reviewer="Mia", kind="stars", value=4, key="key-0001")
    with pytest.raises(reviews.ReviewConflict, match="new key"):
        reviews.append(
            writable.bench.catalog, generation_id=shot.id, reviewer="Mia", kind="stars", value=2, key="key-0001"
        )
    assert first_candidate(writable).standing.my_stars == 4


def test_two_reviewers_may_use_the_same_key(writable: Seeded):
    shot = first_candidate(writable)
    for reviewer in ("Mia", "Leo"):
        reviews.append(
            writable.bench.catalog, generation_id=shot.id, reviewer=reviewer, kind="flag", value=1, key="key-0001"
        )
    assert first_candidate(writable).standing.flags == 2


def test_the_newest_rating_of_each_reviewer_counts_and_zero_clears_it(writable: Seeded):
    shot = first_candidate(writable)
    acts = [("Mia", 2), ("Leo", 5), ("Mia", 3), ("Leo", 0)]
    for number, (reviewer, stars) in enumerate(acts):
        reviews.append(
            writable.bench.catalog,
            generation_id=shot.id,
            reviewer=reviewer,
            kind="stars",
            value=stars,
            key=f"key-{number:04}",
        )
    standing = first_candidate(writable).standing
    assert (standing.my_stars, standing.raters, standing.mean_stars) == (3, 1, 3.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "stars", "value": 6},
        {"kind": "stars", "value": -1},
        {"kind": "stars", "value": True},
        {"kind": "stars", "value": 3, "text": "x"},
        {"kind": "flag", "value": 2},
        {"kind": "comment", "text": "  "},
        {"kind": "comment", "text": "x" * 2001},
        {"kind": "vote", "value": 1},
        {"kind": "flag", "value": 1, "key": "short"},
        {"kind": "flag", "value": 1, "reviewer": " "},
        {"kind": "flag", "value": 1, "reviewer": "x" * 81},
    ],
)
def test_an_impossible_act_is_refused(writable: Seeded, wrong: dict):
    act = {"generation_id": first_candidate(writable).id, "reviewer": "Mia", "key": "key-0001"} | wrong
    with pytest.raises(BadInput):
        reviews.append(writable.bench.catalog, **act)


def test_a_picture_that_the_catalog_does_not_hold_cannot_be_reviewed(writable: Seeded):
    with pytest.raises(reviews.UnknownGeneration, match="not in the catalog"):
        reviews.append(
            writable.bench.catalog, generation_id=10**9, reviewer="Mia", kind="flag", value=1, key="key-0001"
        )
