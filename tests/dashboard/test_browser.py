"""The dashboard in a real browser, against the real server, on a seeded workspace.

SCREENSHOTS=FOLDER keeps the pictures that the last test takes.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import func, select

from components.catalog import gallery
from components.catalog.models import Review
from components.stages import Bench
from components.workspace import Workspace
from tests.dashboard.seed import HOSTILE_NAME, Seeded

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.services, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 60_000
CUT_OFF = """[...document.querySelectorAll('.stHtml *')].filter(
    node => node.getBoundingClientRect().right > innerWidth + 1).map(node => node.outerHTML.slice(0, 120))"""


@dataclass(frozen=True)
class Site:
    """A running dashboard and what lies behind it."""

    url: str
    seeded: Seeded

    def review_count(self) -> int:
        with self.seeded.bench.catalog.read() as session:
            return session.scalar(select(func.count()).where(Review.reviewer == "Mia")) or 0


@pytest.fixture(scope="module")
def site(filled: Seeded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    filled.bench.catalog.engine.dispose()
    home = tmp_path_factory.mktemp("site") / "home"
    shutil.copytree(filled.bench.workspace.home, home)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SAFELIGHT_", "STREAMLIT_"))
    }
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "uvicorn",
            "dashboard.asgi:app",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--log-level",
            "warning",
        ],
        cwd=ROOT,
        env=environment | {"SAFELIGHT_HOME": str(home), "SAFELIGHT_REVIEWER": "Mia"},
    )
    try:
        _await_health(f"http://127.0.0.1:{port}/_stcore/health", server)
        yield Site(f"http://127.0.0.1:{port}", replace(filled, bench=Bench.open(Workspace(home))))
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: "playwright.Browser") -> Iterator["playwright.Page"]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="dark")
    context.set_default_timeout(PATIENCE_MS)
    tab = context.new_page()
    yield tab
    context.close()


def _await_health(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the dashboard did not start")


def _open_board(tab: "playwright.Page", site: Site, query: str = "") -> None:
    tab.goto(f"{site.url}/compare{query}")
    tab.wait_for_selector(".cell img")


def _candidate(site: Site, row: int) -> gallery.Shot:
    board = gallery.board(site.seeded.bench.catalog, site.seeded.evaluation_key, reviewer="Mia")
    return board.rows[row].shots["candidate"]


def _saved(tab: "playwright.Page") -> None:
    playwright.expect(tab.locator(".said")).to_contain_text("saved ✓", timeout=PATIENCE_MS)


def test_a_star_key_is_stored_under_the_reviewers_name_and_survives_a_reload(tab: "playwright.Page", site: Site):
    _open_board(tab, site)
    for place in range(6):
        image = tab.locator(".cell img").nth(place)
        image.evaluate("image => image.decode()")
        assert image.evaluate("image => image.naturalWidth") == 256
    tab.locator(".cell").nth(2).focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("4")
    tab.keyboard.press("x")
    _saved(tab)
    standing = _candidate(site, 2).standing
    assert (standing.my_stars, standing.my_flag) == (4, True)
    tab.reload()
    tab.wait_for_selector(".cell img")
    cell = tab.locator(".cell").nth(8)
    assert cell.get_attribute("aria-label") == "candidate: anchor, green app icon, 4 of 5 stars, flagged"
    assert cell.locator(".star.on").count() == 4


def test_hostile_captions_prompts_names_and_comments_are_text_and_nothing_outside_is_asked(
    tab: "playwright.Page", site: Site
):
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    _open_board(tab, site)
    assert "<script>window.pwned=1</script>" in tab.locator(".prompt").nth(1).inner_text()
    tab.locator(".cell").nth(2).click()
    tab.wait_for_selector(".box .comments")
    assert "<script>window.pwned=1</script>" in tab.locator(".box .comments").inner_text()
    tab.goto(f"{site.url}/datasets")
    tab.wait_for_selector(".cell")
    assert "<script>window.pwned=1</script>" in tab.locator(".caption").nth(3).inner_text()
    tab.locator(".cell").nth(3).click()
    playwright.expect(tab.locator(".box")).to_contain_text(HOSTILE_NAME, timeout=PATIENCE_MS)
    assert tab.evaluate("window.pwned") is None
    for path in ("/", f"/runs?run={site.seeded.run_uid}", "/models"):
        tab.goto(site.url + path)
        tab.wait_for_selector(".sl-title")
        assert tab.evaluate("window.pwned") is None
    assert asked
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {site.url.split("/")[2]}


def test_thirty_quick_key_presses_are_thirty_reviews(tab: "playwright.Page", site: Site):
    _open_board(tab, site)
    before = site.review_count()
    tab.locator(".cell").nth(3).focus()
    for number in range(30):
        tab.keyboard.press(str(1 + number % 5))
        tab.wait_for_timeout(50)
    _saved(tab)
    assert site.review_count() == before + 30


def test_a_review_made_while_the_server_is_away_arrives_when_it_is_back(tab: "playwright.Page", site: Site):
    _open_board(tab, site)
    tab.route("**/api/events", lambda route: route.abort())
    tab.locator(".cell").nth(5).focus()
    tab.keyboard.press("2")
    playwright.expect(tab.locator(".said")).to_contain_text("not saved yet")
    tab.unroute("**/api/events")
    tab.reload()  # the outbox outlives the page
    tab.wait_for_selector(".cell img")
    _saved(tab)
    assert _candidate(site, 1).standing.my_stars == 2


def test_holding_space_shows_the_base_in_place_and_the_lightbox_walks_by_arrows(tab: "playwright.Page", site: Site):
    _open_board(tab, site)
    cell = tab.locator(".cell").nth(2)
    cell.focus()
    tab.keyboard.down(" ")
    playwright.expect(cell.locator(".flipped")).to_have_text("base")
    tab.wait_for_selector(".cell .over")
    tab.keyboard.up(" ")
    assert tab.locator(".over").count() == 0
    tab.keyboard.press("Enter")
    playwright.expect(tab.locator(".box h3")).to_have_text("rocket, red app icon")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    playwright.expect(tab.locator(".box h3")).to_have_text("anchor, green app icon")
    playwright.expect(tab.locator(".box .role")).to_have_text("champion")
    tab.keyboard.press("c")
    tab.keyboard.type("Softer than last week's, r and c and 5 are only letters here")
    tab.keyboard.press("Enter")
    playwright.expect(tab.locator(".box .comments")).to_contain_text("Softer than last week's")
    tab.keyboard.press("Escape")
    assert not tab.locator(".box").is_visible()
    _saved(tab)


@pytest.mark.parametrize("width", [1440, 390])
def test_every_page_fits_its_window(browser: "playwright.Browser", site: Site, width: int, tmp_path: Path):
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark")
    context.set_default_timeout(PATIENCE_MS)
    tab = context.new_page()
    pages = {
        "home": "/",
        "datasets": "/datasets?pile=rejected",
        "runs": "/runs",
        "run": f"/runs?run={site.seeded.run_uid}",
        "compare": "/compare?seed=2&step=400",
        "models": "/models",
    }
    for name, path in pages.items():
        tab.goto(site.url + path)
        tab.wait_for_selector(".cell img" if name == "compare" else ".sl-title")
        tab.wait_for_load_state("networkidle")
        tab.screenshot(path=folder / f"{name}-{width}.png")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(CUT_OFF) == []
        if name == "compare":
            assert "seed=2" in tab.url
            assert tab.locator(".head").inner_text().count("400") == 1
    context.close()
