"""The gallery component: what a board or a grid of cards looks like to `gallery.js`, and the call that mounts it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from components.catalog.datasets import ItemRow, VerdictRow
from components.catalog.gallery import Board, BoardRow, EvaluationDetail, Shot
from components.catalog.models import now
from components.catalog.reviews import Standing
from dashboard.desk import Desk
from dashboard.markup import check_name, number

_HERE = Path(__file__).parent
_mount = st.components.v2.component(
    "safelight_gallery",
    js=(_HERE / "gallery.js").read_text(encoding="utf-8"),
    css=(_HERE / "gallery.css").read_text(encoding="utf-8"),
)


def show_board(desk: Desk, board: Board, detail: EvaluationDetail, *, reviewer: str, step: int | None) -> None:
    """Prompts down; base, champion and candidate across; reviewed in place."""
    axes = detail.axes
    notes = {"base": "without adapter", "champion": _at_step(axes.champion_step), "candidate": _at_step(step)}
    _mount(
        key=f"board-{detail.head.key}",
        data={
            "layout": "board",
            "label": "generated pictures",
            "flips": True,
            "columns": [{"key": role, "label": role, "note": notes[role]} for role in axes.roles],
            "rows": [_row(desk, row, detail.copy_threshold) for row in board.rows],
            "reviewer": reviewer,
            "token": desk.seal.reviewer_token(reviewer),
        },
    )


def show_items(desk: Desk, items: Sequence[ItemRow], verdicts: Mapping[int, Sequence[VerdictRow]], *, key: str) -> None:
    """Files of a snapshot as cards, with what the checks said."""
    _mount(
        key=key,
        data={
            "layout": "cards",
            "label": "files of this snapshot",
            "flips": False,
            "token": None,
            "cards": [_item(desk, item, verdicts.get(item.ordinal, ())) for item in items],
        },
    )


def _row(desk: Desk, row: BoardRow, copy_threshold: float) -> dict[str, Any]:
    ids = {role: f"g{shot.id}" for role, shot in row.shots.items()}
    flips = {"candidate": ids.get("base"), "champion": ids.get("base"), "base": ids.get("candidate")}
    cells = {role: _shot(desk, shot, ids[role], flips.get(role)) for role, shot in row.shots.items()}
    for role, shot in row.shots.items():
        if role != "base" and shot.metrics.get("similarity", -1.0) > copy_threshold:
            cells[role]["tags"] = [["near copy", "bad"]]
    return {
        "title": row.prompt,
        "note": f"#{row.prompt_index + 1} · seed {row.seed}",
        "related": _related(desk, row.shots["candidate"]) if "candidate" in row.shots else [],
        "cells": cells,
    }


def _shot(desk: Desk, shot: Shot, card_id: str, flip: str | None) -> dict[str, Any]:
    rank = shot.metrics.get("prompt_rank")
    facts = [("role", shot.role), ("seed", str(shot.seed))]
    facts += [("step", str(shot.step))] if shot.step else []
    facts += [("prompt rank", f"{rank} (1 is best)")] if rank is not None else []
    facts += [
        (name.replace("_", " "), _said(value))
        for name, value in shot.metrics.items()
        if name not in ("nearest", "similarity", "prompt_rank") and isinstance(value, int | float)
    ]
    facts += [("picture", shot.image_sha256[:12])]
    return {
        "id": card_id,
        "generation": shot.id,
        "role": shot.role,
        "title": shot.prompt,
        "alt": f"{shot.role}: {shot.prompt}",
        "src": desk.thumb(shot.image_sha256),
        "src2x": desk.thumb(shot.image_sha256, 512),
        "flip": flip,
        "facts": facts,
        "related": _related(desk, shot),
        "tags": [],
        "standing": _standing(shot.standing),
    }


def _related(desk: Desk, shot: Shot) -> list[dict[str, Any]]:
    """The training picture that a generation resembles most."""
    near, similarity = shot.metrics.get("nearest"), shot.metrics.get("similarity")
    if not isinstance(near, str) or len(near) != 64:
        return []
    closeness = f", similarity {similarity:.2f}" if isinstance(similarity, int | float) else ""
    return [
        {"src": desk.thumb(near), "alt": "nearest training picture", "note": f"nearest training picture{closeness}"}
    ]


def _said(value: bool | float) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(number(float(value)))


def _item(desk: Desk, item: ItemRow, verdicts: Sequence[VerdictRow]) -> dict[str, Any]:
    facts = [
        ("file", item.file_name),
        ("split", item.split),
        ("group", item.group),
        ("size", f"{item.width} × {item.height} px" if item.width and item.height else None),
        ("licence", item.licence),
        ("author", item.author),
        ("source", item.source),
    ]
    facts += [(f"{verdict.decision}: {check_name(verdict.check)}", verdict.reason) for verdict in verdicts]
    return {
        "id": f"s{item.ordinal}",
        "generation": None,
        "title": item.caption or "no caption",
        "note": verdicts[0].reason if verdicts else item.file_name,
        "alt": item.caption or item.file_name,
        "tags": [
            [check_name(verdict.check), "bad" if verdict.decision == "reject" else "wait"] for verdict in verdicts
        ],
        "src": desk.thumb(item.sha256) if item.sha256 else None,
        "src2x": desk.thumb(item.sha256, 512) if item.sha256 else None,
        "facts": [(name, value) for name, value in facts if value],
        "standing": None,
    }


def _standing(standing: Standing) -> dict[str, Any]:
    today = now().date()
    return {
        "stars": standing.my_stars,
        "flag": standing.my_flag,
        "mean": standing.mean_stars,
        "raters": standing.raters,
        "flags": standing.flags,
        "comments": [
            {
                "by": comment.reviewer,
                "text": comment.text,
                "at": f"{comment.created_at:%H:%M} UTC"
                if comment.created_at.date() == today
                else f"{comment.created_at:%d %b %Y}",
            }
            for comment in standing.comments
        ],
    }


def _at_step(step: int | None) -> str:
    return f"step {step}" if step else ""
