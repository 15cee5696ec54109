"""Models: registered versions, their aliases, the gate's verdict with its reasons, and the files."""

import streamlit as st
from markupsafe import Markup

from components.catalog import overview
from components.catalog.overview import ModelCard
from dashboard.desk import Desk, address, open_desk, whole
from dashboard.markup import (
    ago,
    chip,
    draw,
    facts,
    gate_chip,
    link,
    metric_table,
    notice,
    pictures,
    reasons,
    section,
    table,
    title,
)

ALIASES = {"champion": "champion", "challenger": "live", "previous": "quiet"}


def show() -> None:
    desk = open_desk()
    names = overview.model_names(desk.catalog)
    if not names:
        draw(
            title("Models", "Registered versions and what the gate said about them."),
            notice(
                "quiet",
                "No model is registered yet.",
                "A retraining ends with a registered version under the alias challenger. It becomes champion when "
                "the gate and you agree.",
                "safelight demo",
                "safelight retrain recipe.toml",
            ),
        )
        return
    draw(title("Models", "Registered versions and what the gate said about them."))
    name = st.selectbox("model", names, key="model", bind="query-params", width=280)
    below = whole(st.query_params.get("below"), 0) or None
    cards = overview.model_cards(desk.catalog, name, below=below)
    for card in cards:
        _version(desk, card)
    if cards and cards[-1].version > 1:
        draw(
            Markup('<nav class="sl-pages">{}</nav>').format(
                link("older versions →", address("models", model=name, below=cards[-1].version))
            )
        )
    _history(desk, name)


def _version(desk: Desk, card: ModelCard) -> None:
    compare = address("compare", evaluation=card.evaluation_key)
    aliases = Markup(" ").join(chip(alias, ALIASES.get(alias, "quiet")) for alias in card.aliases)
    thumbs = pictures(((desk.thumb(thumb.image_sha256), thumb.prompt) for thumb in card.thumbs), "wide")
    files = facts(
        [
            *((what, Markup("<code>{}</code>").format(path)) for what, path in card.files),
            ("registry", Markup("<code>{}</code>").format(card.mlflow_uri)),
            ("sha256", Markup("<code>{}</code>").format(card.adapter_sha256[:12])),
        ]
    )
    draw(
        Markup(
            '<article class="sl-version"><h2>Version {} {} <small>gate</small> {}</h2>'
            '<p class="sl-quiet">{} · {} · {}</p><a href="{}">{}</a>{}{}</article>'
        ).format(
            card.version,
            aliases,
            gate_chip(card.gate),
            ago(card.created_at),
            link("the run", address("runs", run=card.run_uid)),
            link("compare pictures", compare),
            compare,
            thumbs,
            reasons(card.gate),
            files,
        )
    )
    if "challenger" in card.aliases:
        draw(
            notice(
                "quiet",
                "To decide",
                "Promotion moves the alias champion; the present champion becomes previous.",
                f"safelight promote {card.name}/{card.version}",
            )
        )
    if card.metrics:
        with st.expander(f"Metrics of version {card.version}"):
            draw(metric_table(card.metrics))


def _history(desk: Desk, name: str) -> None:
    moves = overview.moves(desk.catalog, name)
    if moves:
        draw(
            section("Decisions"),
            table(
                ("when", "version", "decided by", "reason"),
                (
                    (
                        ago(move.created_at),
                        f"{move.previous_version or '–'} → {move.version}",
                        move.decided_by,
                        move.reason,
                    )
                    for move in moves
                ),
            ),
        )
