"""What every test stands on: a workspace of its own, no outside host, and servers that are started once per session."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before any test module imports prefect, mlflow or torch: no telemetry, nobody's real workspace, no spinning threads.
for name in [name for name in os.environ if name.startswith(("SAFELIGHT_", "PREFECT_", "MLFLOW_"))]:
    del os.environ[name]
_elsewhere = tempfile.TemporaryDirectory(prefix="safelight-tests-")
os.environ |= {
    "SAFELIGHT_HOME": f"{_elsewhere.name}/home",
    "PREFECT_HOME": f"{_elsewhere.name}/prefect",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # test processes run side by side
    "OMP_WAIT_POLICY": "PASSIVE",
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest  # noqa: E402

from components.shards import Crew, joined_ray  # noqa: E402
from components.stages import Bench  # noqa: E402
from components.workspace import Workspace  # noqa: E402
from flows import services  # noqa: E402
from flows.processes import LOOPBACK  # noqa: E402


@dataclass(frozen=True)
class Served:
    """A workspace whose Prefect and MLflow are up, and the variables that a process of it needs."""

    workspace: Workspace
    urls: services.Services
    environment: dict[str, str]


SHARING = "tests/flows/"  # what shares the servers of `served`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no process ends alone."""
    items.sort(key=lambda item: not item.nodeid.startswith(SHARING))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """On several processes: what shares the servers goes to one of them, the rest file by file to whichever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SHARING if nodeid.startswith(SHARING) else nodeid.partition("::")[0]

    return ByServers(config, log)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty workspace; SAFELIGHT_HOME points at it."""
    monkeypatch.setenv("SAFELIGHT_HOME", str(tmp_path / "home"))
    return Workspace.from_environment().create()


@pytest.fixture
def bench(workspace: Workspace) -> Iterator[Bench]:
    """The workspace's bench, its catalog at the newest revision."""
    bench = Bench.open(workspace)
    bench.catalog.migrate()
    yield bench
    bench.catalog.engine.dispose()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Real Prefect and MLflow servers, started once since that takes half a minute; names must not clash in there."""
    workspace = Workspace(tmp_path_factory.mktemp("served") / "home").create()
    bench = Bench.open(workspace)
    bench.catalog.migrate()
    bench.catalog.engine.dispose()
    try:
        with socket.socket() as usual:  # held, so that Prefect and its pages are tried on a port that is not their own
            usual.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                usual.bind((LOOPBACK, services.SERVICES["prefect"].port or 0))
                usual.listen()
            urls = services.ensure_up(workspace)
        yield Served(workspace, urls, services.environment(workspace, urls))
    finally:
        services.down(workspace)


@pytest.fixture
def in_served(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The served workspace as this process's own."""
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    return served


@pytest.fixture(scope="session")
def two_on_ray() -> Iterator[Crew]:
    """A Ray of two workers, which takes ten seconds to start: every test joins the same."""
    pytest.importorskip("ray", reason="Ray is not installed: safelight[ray]")
    with joined_ray(crew := Crew("ray", 2)):
        yield crew
