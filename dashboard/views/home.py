"""Home: what runs, what waits for a person, what happened last."""

import streamlit as st
from markupsafe import Markup

from components.catalog import overview
from components.catalog.overview import LiveRun, Waiting
from dashboard.desk import Desk, address, mending, open_desk, services, trail
from dashboard.markup import (
    ago,
    bar,
    chip,
    draw,
    gate_chip,
    link,
    notice,
    number,
    pictures,
    plural,
    section,
    title,
)
from dashboard.views.runs import run_lines

STAGES = ("curate", "cache", "fine-tune", "evaluate", "register")


def show() -> None:
    desk = open_desk()
    draw(title("Safelight", "What runs, what waits for you, what came out."))
    _service_banner(desk)
    _live(desk)
    _waiting(desk)
    table = overview.run_table(desk.catalog, limit=8)
    if table.rows:
        draw(section("Latest runs", link("all runs", address("runs"))), run_lines(desk, table.rows))
    else:
        draw(
            notice(
                "quiet",
                "No run yet.",
                "Start one; it shows up here while it works.",
                "safelight demo",
                "safelight retrain recipe.toml",
            )
        )


def _service_banner(desk: Desk) -> None:
    found = services(desk)
    away = [name for name, url in (("MLflow", found.mlflow_url), ("Prefect", found.prefect_url)) if not url]
    if away:
        verb = "is" if len(away) == 1 else "are"
        draw(
            notice(
                "wait",
                f"{' and '.join(away)} {verb} not running.",
                "Everything here can be read and reviewed; only links to it are missing.",
                "safelight up",
            )
        )


@st.fragment(run_every=2)
def _live(desk: Desk) -> None:
    with mending():
        runs = overview.live_runs(desk.catalog)
        if runs:
            draw(
                section("Running now", plural(len(runs), "run")),
                Markup('<div class="sl-running">{}</div>').format(
                    Markup("").join(_live_card(desk, run) for run in runs)
                ),
            )


def _live_card(desk: Desk, run: LiveRun) -> Markup:
    rail = Markup("").join(
        Markup('<li class="{}">{}</li>').format(
            "done" if stage in run.finished_stages else "now" if stage == run.stage else "", stage
        )
        for stage in STAGES
    )
    facts = [f"{run.done:,} of {run.total:,}".replace(",", " ")] if run.total and run.done is not None else []
    told = trail(desk, run.run_uid)
    facts += [f"loss {number(told.loss)}"] if told.loss is not None and run.stage == "fine-tune" else []
    step, previews = told.newest_previews()
    state = chip("no sign of life", "bad") if run.silent else chip("running", "live")
    mend = (
        Markup("<p>Its heartbeat stopped {}. <code>safelight doctor</code> tells whether it still works.</p>").format(
            ago(run.heartbeat_at)
        )
        if run.silent
        else Markup("")
    )
    drawn = pictures(((desk.thumb(sha256), f"preview at step {step}") for sha256 in previews[:8]), "preview")
    return Markup(
        '<article class="sl-card"><div class="sl-grow"><h3>{} {}</h3><ol class="sl-rail">{}</ol>{}'
        '<p class="sl-quiet">{} · started {}</p>{}</div>{}</article>'
    ).format(
        link(run.name, address("runs", run=run.run_uid)),
        state,
        rail,
        bar(run.done, run.total),
        " · ".join(facts) or (run.stage or "starting"),
        ago(run.created_at),
        mend,
        drawn,
    )


def _waiting(desk: Desk) -> None:
    found = overview.waiting(desk.catalog)
    draw(section("Waiting for you", plural(len(found), "candidate") if found else ""))
    if not found:
        draw(
            Markup(
                '<p class="sl-quiet">Nothing waits for a decision. A new candidate shows up here as soon as it is '
                "registered.</p>"
            )
        )
    for item in found:
        draw(_waiting_card(desk, item))


def _waiting_card(desk: Desk, item: Waiting) -> Markup:
    review = address("compare", evaluation=item.evaluation_key)
    thumbs = pictures((desk.thumb(thumb.image_sha256), thumb.prompt) for thumb in item.thumbs)
    flagged = f" · {plural(item.flagged, 'flag')}" if item.flagged else ""
    said = item.gate.why or "The gate has not spoken."
    return Markup(
        '<article class="sl-card sl-wait-card"><div class="sl-grow"><h3>{} <small>version {}</small> {}</h3>'
        '<p>{}</p><p class="sl-quiet">{} of {} rated{} · registered {}</p>'
        '<a class="sl-button" href="{}">Review pictures</a></div><a href="{}" aria-label="review {}">{}</a>'
        "</article>"
    ).format(
        link(item.name, address("models", model=item.name)),
        item.version,
        gate_chip(item.gate),
        said,
        item.rated,
        item.pictures,
        flagged,
        ago(item.created_at),
        review,
        review,
        item.name,
        thumbs,
    )
