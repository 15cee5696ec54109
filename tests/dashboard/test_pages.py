"""Every page on an empty, a filled and a broken catalog: written states, no traceback, no heavy import."""

import subprocess
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from components.catalog import datasets
from components.curation.editing import caption_history
from components.stages import Bench
from components.workspace import Workspace
from tests.dashboard.seed import HOSTILE, Seeded

PAGES = ("home", "datasets", "runs", "compare", "models")
ROOT = Path(__file__).parents[2]


def page(name: str, **query: str) -> AppTest:
    """A page as a visitor sees it first, through the same frame as in the browser."""

    def visit(name: str) -> None:
        import importlib

        from dashboard.desk import mending

        with mending():
            importlib.import_module(f"dashboard.views.{name}").show()

    app = AppTest.from_function(visit, kwargs={"name": name}, default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    return app.run()


def words(app: AppTest) -> str:
    """All HTML on the page."""
    assert not app.exception
    return "\n".join(element.proto.body for element in app.get("html"))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose catalog has all its tables and not a row."""
    bench = Bench.open(Workspace(tmp_path_factory.mktemp("empty")))
    bench.catalog.migrate()
    return bench.workspace.home


@pytest.fixture
def home(filled: Seeded, monkeypatch: pytest.MonkeyPatch) -> Seeded:
    monkeypatch.setenv("SAFELIGHT_HOME", str(filled.bench.workspace.home))
    return filled


@pytest.mark.parametrize("name", PAGES)
def test_a_workspace_without_a_catalog_says_how_to_begin_and_stays_untouched(name: str):
    workspace = Workspace.from_environment()
    assert "safelight demo" in words(page(name))
    assert not workspace.home.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("home", "No run yet"),
        ("datasets", "No dataset yet"),
        ("runs", "No run yet"),
        ("compare", "No pictures to compare yet"),
        ("models", "No model is registered"),
    ],
)
def test_an_empty_catalog_has_a_written_state(name: str, says: str, empty: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAFELIGHT_HOME", str(empty))
    found = words(page(name))
    assert says in found
    assert "safelight " in found


@pytest.mark.parametrize(
    ("name", "content", "says", "mend"),
    [
        *((name, b"", "another version of Safelight", "safelight up") for name in PAGES),
        ("compare", b"no database " * 100, "file is damaged", "safelight doctor"),
    ],
)
def test_a_broken_catalog_has_a_sentence_and_a_mend(name, content, says, mend, *, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "catalog.db").write_bytes(content)
    monkeypatch.setenv("SAFELIGHT_HOME", str(tmp_path / "broken"))
    found = words(page(name))
    assert says in found
    assert mend in found
    assert "Traceback" not in found


def test_a_database_server_that_is_away_has_a_sentence_without_its_password(tmp_path, monkeypatch):
    from sqlalchemy.exc import OperationalError

    from dashboard.desk import explain

    cause = OperationalError("select", {}, Exception("connection refused: postgresql://u:secret@db"))
    assert "secret" not in "".join(explain(cause))
    assert "does not answer" in explain(cause)[0]


@pytest.mark.parametrize("name", PAGES)
def test_a_filled_catalog_is_drawn(name: str, home: Seeded):
    found = words(page(name))
    assert "could not be drawn" not in found
    assert "app-icons" in found or name == "datasets"


def test_home_shows_the_live_run_what_waits_and_that_servers_are_away(home: Seeded):
    found = words(page("home"))
    assert "366 of 600" in found
    assert "Review pictures" in found
    assert "MLflow and Prefect are not running" in found
    assert "/thumb/" in found


def test_a_run_page_shows_stages_metrics_gate_and_links(home: Seeded):
    found = words(page("runs", run=home.run_uid))
    for part in (
        "fine-tune",
        "Prompt match",
        "[−0.029, −0.013]",
        "not measured",
        "near copy",
        "http://127.0.0.1:5000/#/runs/3",
        f"/compare?evaluation={home.evaluation_key}",
    ):
        assert part in found


def test_a_failed_run_shows_its_error_and_where_the_log_is(home: Seeded):
    found = words(page("runs", run=home.failed_run_uid))
    assert "loss is nan at step 212" in found
    assert f"safelight logs {home.failed_run_uid}" in found


@pytest.mark.parametrize(
    ("name", "query", "says"),
    [
        ("runs", {"run": "nobody"}, "No such run"),
        ("compare", {"evaluation": "nothing"}, "No such gallery"),
        ("compare", {"from": "-1"}, "app-icons"),
        ("compare", {"from": "9" * 40}, "app-icons"),
        ("compare", {"q": "zebra"}, "No prompt matches"),
        ("datasets", {"after": "x"}, "digest"),
        ("models", {"below": "1"}, "Decisions"),
        ("runs", {"before": "0"}, "No run matches"),
    ],
)
def test_an_address_that_leads_nowhere_has_a_written_state(home: Seeded, name: str, query: dict, says: str):
    assert says in words(page(name, **query))


def test_compare_can_be_asked_for_the_gallery_of_a_run(home: Seeded):
    app = page("compare", run=home.run_uid)
    assert app.query_params["evaluation"] in (home.evaluation_key, [home.evaluation_key])
    assert "could not be drawn" not in words(app)


def test_two_versions_of_a_dataset_are_compared(home: Seeded):
    app = page("datasets", snapshot="app-icons v2", against="app-icons v1")
    found = words(app)
    assert "from app-icons v1 to app-icons v2" in found and "added" in found
    assert "<script>" not in found
    assert "What changed" not in words(page("datasets", snapshot="app-icons v2", against="app-icons v9"))


STATISTICS = {
    "of": "x", "base": "embedded", "captions": 90, "distinct": 88, "identical_share": 0.04,
    "words": [["icon", 90]], "tags": [["red app icon", 18]], "triggers": {"sks": 12},
    "written_by": {"sources": 80, "blip@0123456789ab": 10},
    "tokenizers": [{"tokenizer": "tokenizer", "limit": 24, "median": 9.0, "p95": 12.0, "longest": 31, "truncated": 1,
                    "worst": [{"file_name": "a.png", "tokens": 31, "lost": HOSTILE}]}],
}  # fmt: skip


def test_a_version_shows_what_its_captions_are_like_and_what_the_tokenizer_cuts(
    writable: Seeded, monkeypatch: pytest.MonkeyPatch
):
    datasets.note_in_profile(writable.bench.catalog, writable.snapshot_id, "caption_statistics", STATISTICS)
    monkeypatch.setenv("SAFELIGHT_HOME", str(writable.bench.workspace.home))
    found = words(page("datasets", snapshot="app-icons v2"))
    for part in ("longest 31, 1 of them cut at 24", "what falls off", "in 12 of 90", "red app icon 18", "blip@"):
        assert part in found
    assert "<script>" not in found


def test_a_caption_written_on_the_page_is_kept_as_a_version_of_the_viewers(
    writable: Seeded, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAFELIGHT_HOME", str(writable.bench.workspace.home))
    app = page("datasets", snapshot="app-icons v2")
    app.session_state["reviewer"] = "Ada"
    file_name = app.selectbox(key="captioned-file").value
    app.text_area[0].set_value("a rocket at dawn")
    app.button[0].click()
    app.run()
    assert "has it in the next version of app-icons" in words(app) and not app.markdown
    (version,) = caption_history(writable.bench.catalog, "app-icons", file_name).versions
    assert (version.text, version.author) == ("a rocket at dawn", "Ada")
    app.text_area[0].set_value(" ")
    app.button[0].click()
    app.run()
    assert "the caption is empty" in words(app)


def test_hostile_names_are_escaped_in_every_piece_of_html(writable: Seeded, monkeypatch: pytest.MonkeyPatch):
    from sqlalchemy import update

    from components.catalog.models import ModelVersion, Run

    with writable.bench.catalog.write() as session:
        session.execute(update(Run).values(name=HOSTILE, error=HOSTILE, host=HOSTILE))
        session.execute(update(ModelVersion).values(name=HOSTILE, mlflow_uri=HOSTILE))
    monkeypatch.setenv("SAFELIGHT_HOME", str(writable.bench.workspace.home))
    for app in (page("home"), page("runs"), page("runs", run=writable.run_uid), page("compare"), page("models")):
        found = words(app)
        assert "<script>" not in found
        assert "<img src=x" not in found
        assert "could not be drawn" not in found
        assert not app.markdown  # Markdown would turn a name into a link or a picture


def test_links_outside_are_http_only():
    from dashboard.markup import outside

    assert "<a" in outside("MLflow", "http://127.0.0.1:5000")
    assert "<a" not in outside("MLflow", "javascript:alert(1)")


def test_no_page_imports_torch_mlflow_or_prefect():
    code = (
        "import sys, dashboard.asgi, dashboard.main\n"
        "print([name for name in ('torch', 'mlflow', 'prefect', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
