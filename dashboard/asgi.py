"""The dashboard as an ASGI app: `uvicorn dashboard.asgi:app`. One process, bound to 127.0.0.1 unless told otherwise."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import streamlit as st
from starlette.routing import Route

from components.catalog.database import Catalog
from components.workspace import Workspace
from dashboard.events import events_route
from dashboard.signing import Seal
from dashboard.thumbs import thumb_route

log = logging.getLogger("safelight.dashboard")


def routes(workspace: Workspace, catalog: Catalog) -> list[Route]:
    """What we serve beside the pages."""
    seal = Seal.of(workspace)
    return [thumb_route(workspace, catalog, seal), events_route(catalog, seal)]


def make_app(workspace: Workspace) -> st.App:
    catalog = Catalog(workspace.catalog_url)

    @asynccontextmanager
    async def close_catalog(_app: Any) -> AsyncIterator[None]:
        yield
        catalog.engine.dispose()

    return st.App(
        Path(__file__).with_name("main.py").resolve(),
        routes=routes(workspace, catalog),
        lifespan=close_catalog,
        on_script_error=_say_so,
    )


def _say_so(error: Exception) -> bool:
    """Whatever slipped through a page's own error states: the log gets the traceback, the reader a sentence."""
    log.error("a page failed", exc_info=error)
    st.error(
        "This page could not be drawn. The cause is in the dashboard's log; `safelight doctor` looks for the usual "
        "ones.",
        icon=":material/error:",
    )
    return True


app = make_app(Workspace.from_environment())
