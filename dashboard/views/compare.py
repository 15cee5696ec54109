"""Compare: prompts down, base, champion and candidate across; stars, flags and comments in place."""

from dataclasses import dataclass

import streamlit as st
from markupsafe import Markup

from components.catalog import gallery
from components.catalog.gallery import Board, EvaluationDetail, EvaluationHead, Show
from components.catalog.reviews import MAX_REVIEWER
from dashboard.desk import Desk, address, open_desk, reviewer, whole
from dashboard.gallery import show_board
from dashboard.markup import draw, gate_chip, link, metric_name, notice, number, plural, reasons, title

ALL_SEEDS = "all"
SHOWN: tuple[Show, ...] = ("all", "unrated", "flagged")


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of the board is on screen, and who looks at it."""

    take: int | None  # None: every seed of each prompt
    step: int | None
    show: Show
    search: str
    reviewer: str


def show() -> None:
    desk = open_desk()
    found = gallery.evaluations(desk.catalog)
    if not found:
        draw(
            title("Compare", "The same prompts and seeds, side by side."),
            notice(
                "quiet",
                "No pictures to compare yet.",
                "A retraining ends with a gallery of held-out prompts.",
                "safelight demo",
                "safelight retrain recipe.toml",
            ),
        )
        return
    _take_run_from_url(desk)
    detail = _choose(desk, found)
    if detail is None:
        draw(
            notice("quiet", "No such gallery.", "The catalog does not hold the one that this address names."),
            Markup("<p>{}</p>").format(link("newest gallery", address("compare"))),
        )
        return
    _head(detail)
    _board(desk, detail, _cut(detail, found))


def _take_run_from_url(desk: Desk) -> None:
    """`?run=<uid>` is a short way to say "the gallery of that run"."""
    if "run" in st.query_params:
        key = gallery.evaluation_of_run(desk.catalog, st.query_params["run"])
        del st.query_params["run"]
        if key is not None:
            st.query_params["evaluation"] = key


def _choose(desk: Desk, found: tuple[EvaluationHead, ...]) -> EvaluationDetail | None:
    return gallery.evaluation_detail(desk.catalog, st.query_params.get("evaluation") or found[0].key)


def _head(detail: EvaluationDetail) -> None:
    strip = Markup("").join(
        Markup('<div><dt>{}</dt><dd>{}</dd><dd class="sl-was">base {}</dd></div>').format(
            metric_name(metric.name), number(metric.candidate), number(metric.base)
        )
        for metric in detail.metrics[:5]
    )
    draw(
        title(
            detail.head.name,
            Markup("{} {}").format(gate_chip(detail.gate), link("the run", address("runs", run=detail.head.run_uid))),
            Markup('<dl class="sl-metrics">{}</dl>').format(strip) if strip else Markup(""),
        )
    )


def _cut(detail: EvaluationDetail, found: tuple[EvaluationHead, ...]) -> Cut:
    """The row of selectors above the board; all but the reviewer's name live in the address bar."""
    axes, heads = detail.axes, {head.key: head for head in found} | {detail.head.key: detail.head}
    step, take = axes.steps[-1] if axes.steps else None, "1"
    with st.container(horizontal=True, vertical_alignment="bottom", key="board-tools"):
        key = st.selectbox(
            "gallery",
            tuple(heads),
            index=tuple(heads).index(detail.head.key),
            width=250,
            format_func=lambda k: f"{heads[k].name} · {heads[k].created_at:%d %b %H:%M} · {k[:4]}",
        )
        if axes.takes > 1:
            take = st.selectbox(
                f"seed, of {axes.takes}",
                (*map(str, range(1, axes.takes + 1)), ALL_SEEDS),
                key="seed",
                bind="query-params",
                width=100,
                on_change=_to_start,
            )
        if len(axes.steps) > 1:
            step = st.selectbox("step", tuple(reversed(axes.steps)), key="step", bind="query-params", width=110)
        show = st.selectbox(
            "show",
            tuple(SHOWN),
            key="show",
            bind="query-params",
            width=120,
            on_change=_to_start,
            help="unrated: prompts whose candidate you have not rated; flagged: by anyone",
        )
        search = st.text_input(
            "search prompts",
            key="q",
            bind="query-params",
            width=200,
            placeholder="a word",
            max_chars=100,
            on_change=_to_start,
        )
        name = st.text_input(
            "your name",
            value=reviewer(),
            key="reviewer",
            persist_state="session",
            width=160,
            max_chars=MAX_REVIEWER,
            disabled=bool(st.user.get("is_logged_in")),
        )
    if key != detail.head.key:
        st.query_params["evaluation"] = key
        _to_start()
        st.rerun()
    return Cut(None if take == ALL_SEEDS else int(take), step, show, search or "", (name or "").strip() or reviewer())


def _to_start() -> None:
    st.query_params.pop("from", None)


def _board(desk: Desk, detail: EvaluationDetail, cut: Cut) -> None:
    board = gallery.board(
        desk.catalog,
        detail.head.key,
        reviewer=cut.reviewer,
        step=cut.step,
        take=cut.take,
        show=cut.show,
        search=cut.search,
        start=whole(st.query_params.get("from"), 0),
    )
    if board.rows:
        show_board(desk, board, detail, reviewer=cut.reviewer, step=cut.step)
    else:
        draw(notice("quiet", "No prompt matches.", "Choose other seeds, steps or words above."))
    _pages(board)
    if detail.gate.reasons:
        with st.expander("What the gate says"):
            draw(reasons(detail.gate))


def _pages(board: Board) -> None:
    with st.container(horizontal=True, vertical_alignment="center", key="board-pages"):
        if board.previous_from is not None and st.button("← previous prompts"):
            st.query_params["from"] = str(board.previous_from)
            st.rerun()
        if board.rows:
            draw(
                Markup('<p class="sl-quiet">#{} to #{} · {} in all</p>').format(
                    board.rows[0].prompt_index + 1, board.rows[-1].prompt_index + 1, plural(board.prompts, "prompt")
                )
            )
        if board.next_from is not None and st.button("next prompts →", type="primary"):
            st.query_params["from"] = str(board.next_from)
            st.rerun()
