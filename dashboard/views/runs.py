"""Runs: the table of all of them, and one run with its stages, metrics and links."""

import json
from collections.abc import Iterable

import streamlit as st
from markupsafe import Markup

from components.catalog import overview
from components.catalog.models import now
from components.catalog.overview import RunDetail, RunRow
from dashboard.desk import Desk, address, open_desk, services, trail, version_name
from dashboard.markup import (
    NOT_MEASURED,
    ago,
    bar,
    chip,
    draw,
    duration,
    facts,
    gate_chip,
    link,
    metric_name,
    metric_table,
    notice,
    number,
    outside,
    pictures,
    reasons,
    section,
    size,
    status_chip,
    table,
    title,
)

ANY = "all"
STATUSES = (ANY, "running", "completed", "failed", "stopped", "crashed")
CURVES = ("loss", "validation_ratio")
HEADLINES = (
    "kid",
    "prompt_match",
    "colour_match",
    "style",
    "variety",
    "copy_rate",
)  # shown in the table, in this order, where measured
OUTCOMES = {"reused": "quiet", "produced": "good", "repaired": "wait"}


def show() -> None:
    desk = open_desk()
    run_uid = st.query_params.get("run")
    if run_uid:
        _one(desk, run_uid)
    else:
        _all(desk)


def run_lines(desk: Desk, rows: Iterable[RunRow]) -> Markup:
    """Runs as table rows with pictures and headline metrics."""
    return table(
        ("run", "status", "data", "result", "candidate pictures", "gate"),
        (
            (
                Markup("<b>{}</b><small>{} · {}</small>").format(
                    link(row.name, address("runs", run=row.run_uid)), ago(row.created_at), _took(row)
                ),
                status_chip(row.status),
                _data(row),
                _headline(row),
                _strip(desk, row),
                gate_chip(row.gate) if row.evaluation_key else Markup('<span class="sl-none">–</span>'),
            )
            for row in rows
        ),
        "sl-runs",
    )


def _all(desk: Desk) -> None:
    draw(title("Runs", "Every execution, newest first."))
    names = overview.run_names(desk.catalog)
    if not names:
        draw(
            notice(
                "quiet",
                "No run yet.",
                "A recipe, a folder of captioned pictures, one command.",
                "safelight demo",
                "safelight init",
                "safelight retrain recipe.toml",
            )
        )
        return
    with st.container(horizontal=True, key="run-tools"):
        name = st.selectbox("name", (ANY, *names), key="name", bind="query-params", width=240, on_change=_to_start)
        status = st.selectbox("status", STATUSES, key="status", bind="query-params", width=180, on_change=_to_start)
    before = st.query_params.get("before")
    found = overview.run_table(
        desk.catalog, before=before, name=None if name == ANY else name, status=None if status == ANY else status
    )
    if not found.rows:
        draw(notice("quiet", "No run matches.", "Choose another name or status."))
    else:
        draw(run_lines(desk, found.rows))
    same = {"name": None if name == ANY else name, "status": None if status == ANY else status}
    pages = [link("← newest", address("runs", **same))] if before else []
    pages += [link("older →", address("runs", before=found.next_before, **same))] if found.next_before else []
    draw(Markup('<nav class="sl-pages">{}</nav>').format(Markup(" ").join(pages)))


def _to_start() -> None:
    st.query_params.pop("before", None)


def _one(desk: Desk, run_uid: str) -> None:
    run = overview.run_detail(desk.catalog, run_uid)
    draw(Markup('<nav class="sl-crumb">{}</nav>').format(link("← all runs", address("runs"))))
    if run is None:
        draw(
            title("No such run", ""),
            notice(
                "quiet",
                "The catalog holds no run of this uid.",
                "It may belong to another workspace.",
                "safelight runs",
            ),
        )
        return
    row = run.row
    draw(
        title(
            row.name,
            Markup("{} {} {}").format(
                status_chip(row.status), gate_chip(row.gate) if row.evaluation_key else "", _actions(desk, run)
            ),
        )
    )
    if row.error:
        draw(notice("bad", f"The run {row.status}.", row.error, f"safelight logs {row.run_uid}"))
    draw(_facts(desk, run))
    if row.status == "running":
        draw(
            section("Progress", str(run.progress.get("stage") or "")),
            bar(run.progress.get("done"), run.progress.get("total")),
        )
    if row.thumbs:
        compare = address("compare", evaluation=row.evaluation_key)
        draw(
            section("Candidate", link("compare with base and champion", compare)),
            Markup('<a href="{}">{}</a>').format(compare, _strip(desk, row, "wide")),
        )
    if row.metrics:
        draw(section("Metrics", "held-out prompts, paired by prompt and seed"), metric_table(row.metrics))
    if row.gate.decision:
        draw(section("Gate", gate_chip(row.gate)), reasons(row.gate))
    draw(section("Stages"), _stages(run))
    _curves(desk, run)
    with st.expander("Recipe"):
        st.code(json.dumps(run.recipe, indent=2, ensure_ascii=False), language="json")


def _actions(desk: Desk, run: RunDetail) -> Markup:
    """Links to the tracker and the orchestrator: the card's own, else built from where the servers are now."""
    urls = run.card.get("urls")
    urls = urls if isinstance(urls, dict) else {}
    found = services(desk)
    prefect = urls.get("prefect") or (
        f"{found.prefect_url}/runs/flow-run/{run.prefect_flow_run_id}"
        if found.prefect_url and run.prefect_flow_run_id
        else ""
    )
    mlflow = urls.get("mlflow") or found.mlflow_url
    links = [outside(name, str(url)) for name, url in (("MLflow", mlflow), ("Prefect", prefect)) if url]
    links += [link(f"{name} version {version}", address("models", model=name)) for name, version in run.models]
    return Markup('<span class="sl-links">{}</span>').format(Markup(" ").join(links))


def _facts(desk: Desk, run: RunDetail) -> Markup:
    row = run.row
    pairs: list[tuple[str, str | Markup]] = [("started", ago(row.created_at)), ("took", _took(row))]
    if row.dataset:
        pairs.append(
            (
                "data",
                link(
                    f"{row.dataset} · version {row.dataset_version}",
                    address("datasets", snapshot=version_name(row.dataset, row.dataset_version or 0)),
                ),
            )
        )
    pairs += [("host", run.host), ("code", run.git_commit[:10] if run.git_commit else "not under git")]
    adapter = run.card.get("adapter")
    if isinstance(adapter, dict) and adapter.get("sha256"):
        pairs.append(("adapter", f"{str(adapter['sha256'])[:12]} · step {adapter.get('step')}"))
    return facts([*pairs, ("run", Markup("<code>{}</code>").format(row.run_uid))])


def _stages(run: RunDetail) -> Markup:
    if not run.stages:
        return Markup('<p class="sl-quiet">No stage has finished yet.</p>')
    order = {"curate": 0, "cache": 1, "fine-tune": 2, "evaluate": 3, "register": 4}
    lines = sorted(run.stages, key=lambda line: order.get(line.stage, 9))
    return table(
        ("stage", "outcome", "time", "items", "bytes", "key"),
        (
            (
                Markup("<b>{}</b>").format(line.stage),
                chip(line.outcome, OUTCOMES.get(line.outcome, "quiet")),
                duration(line.seconds),
                f"{line.items:,}".replace(",", " "),
                size(line.bytes),
                Markup("<code>{}</code>").format(line.key[:12]),
            )
            for line in lines
        ),
        "sl-numbers",
    )


def _curves(desk: Desk, run: RunDetail) -> None:
    told = trail(desk, run.row.run_uid)
    shown = [name for name in CURVES if len(told.curves.get(name, ())) > 1]
    if shown:
        draw(section("Curves"))
        for column, name in zip(st.columns(len(shown)), shown, strict=True):
            points = told.curve(name)
            with column:
                draw(Markup('<p class="sl-quiet">{}</p>').format(metric_name(name)))
                st.line_chart(
                    {"step": [p[0] for p in points], "value": [p[1] for p in points]},
                    x="step",
                    y="value",
                    y_label="",
                    height=220,
                )
    if told.previews:
        draw(section("Checkpoints", "the same prompts and seeds at every step"))
        for step, by_key in sorted(told.previews.items(), reverse=True):
            draw(
                Markup('<div class="sl-step"><span>step {}</span>{}</div>').format(
                    step,
                    pictures(
                        ((desk.thumb(sha256), f"{key} at step {step}") for key, sha256 in sorted(by_key.items())),
                        "wide",
                    ),
                )
            )


def _took(row: RunRow) -> str:
    seconds = ((row.ended_at or now()) - row.created_at).total_seconds()
    return duration(max(0.0, seconds)) + ("" if row.ended_at else " so far")


def _data(row: RunRow) -> str | Markup:
    if row.dataset is None:
        return Markup('<span class="sl-none">–</span>')
    return Markup("<span>{}<small>version {}</small></span>").format(row.dataset, row.dataset_version)


def _headline(row: RunRow) -> str | Markup:
    measured = {metric.name: metric for metric in row.metrics}
    chosen = [measured[name] for name in HEADLINES if name in measured] or list(row.metrics)
    if not chosen:
        return NOT_MEASURED
    return Markup('<dl class="sl-mini">{}</dl>').format(
        Markup("").join(
            Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(metric_name(metric.name), number(metric.candidate))
            for metric in chosen[:3]
        )
    )


def _strip(desk: Desk, row: RunRow, kind: str = "strip") -> Markup:
    return pictures(((desk.thumb(thumb.image_sha256), thumb.prompt) for thumb in row.thumbs), kind)
