"""What every page has at hand: workspace, catalog, signatures, the reviewer's name, and words for what goes wrong."""

import getpass
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlencode

import streamlit as st
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from components.catalog.database import Catalog
from components.catalog.reviews import MAX_REVIEWER
from components.errors import SafelightError, ServiceUnavailable
from components.workspace import Workspace
from dashboard.markup import draw, notice
from dashboard.signing import Seal
from dashboard.trail import Trail
from flows.services import Services, current

log = logging.getLogger("safelight.dashboard")
REVIEWER_COOKIE = "safelight_reviewer"


@dataclass(frozen=True, slots=True)
class Desk:
    """The things behind a page."""

    workspace: Workspace
    catalog: Catalog
    seal: Seal

    def thumb(self, sha256: str, size: int = 256) -> str:
        return self.seal.thumb_url(sha256, size)


class NoCatalogYet(SafelightError):
    """A workspace in which nothing has ever run."""


def open_desk() -> Desk:
    """The desk of the workspace that the environment names. Raises NoCatalogYet before the first run."""
    workspace = Workspace.from_environment()
    url = make_url(workspace.catalog_url)
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        raise NoCatalogYet(f"{workspace.home}: nothing has run here yet")
    return _open(workspace, workspace.catalog_url)


@st.cache_resource(max_entries=4, show_spinner=False)
def _open(_workspace: Workspace, url: str) -> Desk:
    return Desk(_workspace, Catalog(url), Seal.of(_workspace))


def trail(desk: Desk, run_uid: str) -> Trail:
    """A run's journal as far as it is written; this visitor's last reading is continued."""
    trails: dict[str, Trail] = st.session_state.setdefault("trails", {})
    return trails.setdefault(run_uid, Trail(desk.workspace.run_dir(run_uid) / "journal.jsonl")).advance()


def services(desk: Desk) -> Services:
    """Addresses of Prefect and MLflow; empty where a server is away."""
    try:
        return current(desk.workspace)
    except (OSError, ValueError, SafelightError):
        return Services()


def reviewer() -> str:
    """Who is looking: the signed-in user, else the name given on Compare, else the one this machine knows."""
    if st.user.get("is_logged_in"):
        return str(st.user.get("name") or st.user.get("email"))[:MAX_REVIEWER]
    chosen = st.session_state.get("reviewer") or unquote(st.context.cookies.get(REVIEWER_COOKIE, ""))
    return (chosen.strip() or os.environ.get("SAFELIGHT_REVIEWER", "").strip() or _os_user())[:MAX_REVIEWER]


def address(page: str, **query: str | int | None) -> str:
    """A page of this dashboard with its state, as a link."""
    given = {name: value for name, value in query.items() if value is not None}
    return f"/{page}" + (f"?{urlencode(given)}" if given else "")


def version_name(dataset: str, version: int) -> str:
    """A dataset's version as it stands in selectors and in the address bar."""
    return f"{dataset} v{version}"


def whole(text: str | None, otherwise: int) -> int:
    """A whole number from the address bar, or `otherwise`."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else otherwise


@contextmanager
def mending() -> Iterator[None]:
    """Around a page or a fragment: whatever cannot be read becomes a sentence with its mend, never a traceback."""
    try:
        yield
    except NoCatalogYet:
        welcome()
    except (SQLAlchemyError, SafelightError) as error:
        log.warning("%s", error, exc_info=not isinstance(error, SafelightError))
        title, mend, command = explain(error)
        draw(notice("bad", title, mend, command))
    except Exception as error:
        log.error("a page failed", exc_info=error)
        draw(
            notice(
                "bad",
                "This page could not be drawn.",
                "The cause is in the dashboard's log. The doctor looks for the usual ones.",
                "safelight doctor",
            )
        )


def welcome() -> None:
    """The empty state of a workspace without a catalog."""
    draw(
        notice(
            "quiet",
            "Nothing has run in this workspace yet.",
            "The demo curates a small set of icons, fine-tunes the embedded model on it and fills these pages in "
            "minutes, on a laptop without a GPU. Your own pictures need a folder and a recipe.",
            "safelight demo",
            "safelight init",
            "safelight retrain recipe.toml",
        )
    )


def explain(error: Exception) -> tuple[str, str, str]:
    """(what was found, what to do, the command for it)."""
    if isinstance(error, ServiceUnavailable):
        return "A server does not answer.", str(error), "safelight status"
    if isinstance(error, SafelightError):
        return "This could not be read.", str(error), "safelight doctor"
    cause = str(error.orig if isinstance(error, DBAPIError) else error).lower()
    if any(sign in cause for sign in ("no such table", "no such column", "does not exist", "undefined")):
        return (
            "The catalog was written by another version of Safelight.",
            "Starting the services brings it up to date; nothing is lost.",
            "safelight up",
        )
    if "not a database" in cause or "malformed" in cause:
        return (
            "The catalog's file is damaged.",
            "Move it aside and put a backup in its place; the doctor says which parts can be rebuilt.",
            "safelight doctor",
        )
    if "locked" in cause or "busy" in cause:
        return "The catalog is busy.", "A long write holds it. Reload this page in a moment.", "safelight status"
    return (
        "The catalog does not answer.",
        "Pages come back by themselves as soon as it does. Reviews that were not saved yet are kept in the browser.",
        "safelight doctor",
    )


def _os_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "reviewer"
