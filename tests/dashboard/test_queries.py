"""What the pages ask the catalog."""

from datetime import timedelta

import pytest

from components.catalog import gallery, overview, reviews
from tests.dashboard.seed import Seeded


def test_a_board_holds_every_role_of_each_prompt_once_per_take(filled: Seeded):
    board = gallery.board(filled.bench.catalog, filled.evaluation_key, reviewer="Mia", take=1)
    assert [row.prompt_index for row in board.rows] == list(range(8))
    assert all(set(row.shots) == {"base", "champion", "candidate"} for row in board.rows)
    assert all(len({shot.seed for shot in row.shots.values()}) == 1 for row in board.rows)


def test_only_prompts_with_several_seeds_have_a_second_take(filled: Seeded):
    board = gallery.board(filled.bench.catalog, filled.evaluation_key, reviewer="Mia", take=2)
    assert [row.prompt_index for row in board.rows] == list(range(6))


def test_all_takes_give_one_row_per_seed(filled: Seeded):
    board = gallery.board(filled.bench.catalog, filled.evaluation_key, reviewer="Mia", take=None)
    assert len(board.rows) == 6 * 4 + 2


def test_a_step_changes_the_candidate_and_leaves_base_and_champion(filled: Seeded):
    early, late = (
        gallery.board(filled.bench.catalog, filled.evaluation_key, reviewer="Mia", step=step).rows[0].shots
        for step in (200, None)
    )
    assert (early["candidate"].step, late["candidate"].step) == (200, 600)
    assert early["base"] == late["base"]
    assert early["champion"] == late["champion"]


def test_pages_of_a_board_follow_each_other_without_gap_or_overlap(filled: Seeded):
    start, seen = 0, []
    while start is not None:
        board = gallery.board(
            filled.bench.catalog, filled.evaluation_key, reviewer="Mia", start=start, prompts_per_page=3
        )
        seen += [row.prompt_index for row in board.rows]
        start = board.next_from
    assert seen == list(range(8))
    assert board.previous_from == 3
    assert board.prompts == 8


@pytest.mark.parametrize(("search", "expected"), [("ANCHOR", [2]), ("100%", []), ("_", []), ("onerror", [1])])
def test_search_takes_its_words_literally(filled: Seeded, search: str, expected: list[int]):
    board = gallery.board(filled.bench.catalog, filled.evaluation_key, reviewer="Mia", search=search)
    assert [row.prompt_index for row in board.rows] == expected


def test_unrated_and_flagged_follow_the_newest_acts(writable: Seeded):
    catalog, key = writable.bench.catalog, writable.evaluation_key

    def shown(show: gallery.Show, take: int | None) -> list[gallery.BoardRow]:
        return list(gallery.board(catalog, key, reviewer="Ana", show=show, take=take).rows)

    (flagged,) = (row.shots["candidate"] for row in shown("flagged", take=3))
    assert flagged.standing.flags == 1
    reviews.append(catalog, generation_id=flagged.id, reviewer="Jun", kind="flag", value=0, key="unflag-1")
    assert shown("flagged", take=None) == []
    unrated = shown("unrated", take=1)
    reviews.append(
        catalog, generation_id=unrated[0].shots["candidate"].id, reviewer="Ana", kind="stars", value=5, key="rate-0001"
    )
    assert [row.prompt_index for row in shown("unrated", take=1)] == [row.prompt_index for row in unrated[1:]]


def test_the_run_table_is_newest_first_and_pages_by_uid(filled: Seeded):
    everything = overview.run_table(filled.bench.catalog)
    uids = [row.run_uid for row in everything.rows]
    assert uids == sorted(uids, reverse=True)
    assert everything.next_before is None
    first = overview.run_table(filled.bench.catalog, limit=2)
    second = overview.run_table(filled.bench.catalog, limit=10, before=first.next_before)
    assert [row.run_uid for row in (*first.rows, *second.rows)] == uids


def test_a_run_shows_its_metrics_gate_and_pictures(filled: Seeded):
    run = overview.run_detail(filled.bench.catalog, filled.run_uid)
    assert run is not None
    kid = next(metric for metric in run.row.metrics if metric.name == "kid")
    assert (kid.base, kid.champion, kid.better) == (0.1183, 0.0412, "lower")
    assert kid.low < kid.difference < kid.high < 0
    assert run.row.gate.decision == "promote"
    assert [thumb.prompt for thumb in run.row.thumbs][2] == "anchor, green app icon"
    assert len(run.row.thumbs) == overview.THUMBS
    assert overview.run_detail(filled.bench.catalog, "no such run") is None


def test_what_was_not_measured_stays_none(filled: Seeded):
    metrics = overview.parse_metrics({"kid": {"candidate": 0.1, "base": None, "difference": None}, "odd": "text"})
    assert [(m.name, m.base, m.champion, m.difference, m.n) for m in metrics] == [("kid", None, None, None, None)]


def test_live_runs_carry_progress_and_the_stages_behind_them(filled: Seeded):
    (live,) = overview.live_runs(filled.bench.catalog)
    assert (live.run_uid, live.stage, live.done, live.total) == (filled.live_run_uid, "fine-tune", 366, 600)
    assert set(live.finished_stages) == {"curate", "cache"}


def test_a_live_run_is_silent_when_its_heartbeat_stopped_minutes_ago(filled: Seeded):
    (live,) = overview.live_runs(filled.bench.catalog)
    silent = {
        seconds: overview.live_runs(filled.bench.catalog, at=live.heartbeat_at + timedelta(seconds=seconds))[0].silent
        for seconds in (0, 300, 301)
    }
    assert silent == {0: False, 300: False, 301: True}


def test_an_undecided_challenger_waits_with_its_review_counts(filled: Seeded):
    (waiting,) = overview.waiting(filled.bench.catalog)
    assert (waiting.name, waiting.version, waiting.gate.decision) == ("app-icons", 3, "promote")
    assert (waiting.rated, waiting.flagged) == (8, 1)


def test_models_come_newest_first_with_their_files(filled: Seeded):
    cards = overview.model_cards(filled.bench.catalog, "app-icons")
    assert [(card.version, card.aliases) for card in cards] == [
        (3, ("challenger",)),
        (2, ("champion",)),
        (1, ("previous",)),
    ]
    assert cards[0].files[0][0] == "adapter file"
    assert [move.decided_by for move in overview.moves(filled.bench.catalog, "app-icons")] == ["Ana", "gate"]


def test_a_verdict_is_told_by_the_sentence_that_decided_it():
    reasons = tuple(overview.Reason(*pair) for pair in (("pass", "Enough prompts."), ("hold", "A loss is possible.")))
    assert overview.Gate("hold", reasons).why == "A loss is possible."
    assert overview.Gate("promote", reasons[:1]).why == "Enough prompts."
    assert overview.Gate().why == ""
