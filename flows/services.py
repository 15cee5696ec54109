"""The servers of a workspace: Prefect, a lean MLflow, the dashboard and the deployment runner, detached, on 127.0.0.1.

Ports are remembered per workspace so that links keep working. A process is known by (pid, creation time) and by a
mark in its environment, so `down` ends exactly what `up` started, also when the command that started it died halfway.
"""

import http.client
import importlib.util
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil
from filelock import FileLock

from components.errors import BadInput, ServiceUnavailable
from components.workspace import Workspace
from flows import prefect_api
from flows.processes import (
    CLOCK_SLACK_S,
    LOOPBACK,
    MARK,
    Record,
    end,
    last_line,
    last_lines,
    marked_processes,
    read_records,
    url_of,
    write_records,
)

Progress = Callable[[str], None]
State = Literal["up", "starting", "down", "elsewhere", "absent"]

PORTS_TRIED = 200
POLL_S = 0.2
PARTING_LINES = 40  # of a log, among which a server says why it ends: a traceback may follow
LEASES_ON_DISK = "prefect.server.concurrency.lease_storage.filesystem"  # in memory, a killed server's slots stay taken
RUNNER_BEAT_S = 60.0  # the runner touches its beat file at every poll


@dataclass(frozen=True, slots=True)
class Services:
    """Browser addresses without a trailing slash; Prefect's API is `{prefect_url}/api`. Empty: not there."""

    prefect_url: str = ""
    mlflow_url: str = ""
    dashboard_url: str = ""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What a service is doing; `elsewhere`: a shared server that this workspace only uses."""

    name: str
    state: State
    url: str
    pid: int | None
    detail: str


@dataclass(frozen=True, slots=True)
class Service:
    """How one server is started and asked for its health."""

    name: str
    port: int | None  # preferred; None: it listens nowhere
    health: str  # path that answers 200 when it is ready
    patience_s: float  # a first start on a busy laptop is slow
    command: Callable[[Workspace, int], list[str]]
    package: str
    after: str | None = None


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _prefect_command(_: Workspace, port: int) -> list[str]:
    return _python("-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port))


def _mlflow_command(workspace: Workspace, port: int) -> list[str]:
    return _python(
        "-m",
        "mlflow",
        "server",
        "--host",
        LOOPBACK,
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        workspace.mlflow_database,
        "--serve-artifacts",
        "--artifacts-destination",
        str(workspace.mlflow_artifacts),
        "--allowed-hosts",
        f"{LOOPBACK}:{port},localhost:{port}",
    )


def _dashboard_command(_: Workspace, port: int) -> list[str]:
    return _python(
        "-m", "uvicorn", "dashboard.asgi:app", "--host", LOOPBACK, "--port", str(port), "--log-level", "warning"
    )


def _runner_command(_: Workspace, __: int) -> list[str]:
    return _python("-m", "flows.deployments")


SERVICES = {
    service.name: service
    for service in (
        Service("prefect", 4200, "/api/health", 240, _prefect_command, "prefect"),
        Service("mlflow", 5000, "/health", 180, _mlflow_command, "mlflow"),
        Service("dashboard", 8501, "/_stcore/health", 120, _dashboard_command, "streamlit"),
        Service("runner", None, "", 120, _runner_command, "prefect", after="prefect"),
    )
}


def up(workspace: Workspace, *, host: str = LOOPBACK, progress: Progress = lambda _: None) -> Services:
    """Start whatever of the four is not running, wait until each is healthy, return the addresses. Idempotent.

    Raises BadInput for an address other machines can reach, ServiceUnavailable naming the service that did not come
    up and the last line of its log.
    """
    refuse_public_address(host)
    return ensure_up(workspace, tuple(SERVICES), progress)


def ensure_up(
    workspace: Workspace, need: Sequence[str] = ("prefect", "mlflow"), progress: Progress = lambda _: None
) -> Services:
    """Start those of `need` that are not running. Costs one health check each when all of them are."""
    workspace.create()
    wanted = [name for name in need if not _elsewhere(name) and _installed(name)]
    for name in need:
        if outside := _elsewhere(name):
            _require_answer(name, outside)
            if name == "prefect":
                prefect_api.prepare(outside.removesuffix("/api"))
    records = read_records(workspace)
    if all(_healthy(workspace, SERVICES[name], records.get(name, Record())) for name in wanted):
        return current(workspace)
    with FileLock(workspace.locks / "services.lock"):
        _Start(workspace, progress).run(wanted)
    return current(workspace)


def current(workspace: Workspace) -> Services:
    """The remembered addresses of what was started and still lives, unchecked; nothing is started."""
    records = read_records(workspace)

    def address(name: str) -> str:
        if outside := _elsewhere(name):
            return outside.removesuffix("/api") if name == "prefect" else outside
        record = records.get(name, Record())
        return url_of(record) if record.process() else ""

    return Services(address("prefect"), address("mlflow"), address("dashboard"))


def status(workspace: Workspace) -> list[ServiceStatus]:
    """What each service is doing right now."""
    records = read_records(workspace)
    return [_status_of(workspace, service, records.get(service.name, Record())) for service in SERVICES.values()]


def down(workspace: Workspace, *, progress: Progress = lambda _: None) -> list[str]:
    """End every process this workspace started, with all their children, and nothing else; returns their names."""
    if not workspace.home.is_dir():
        return []
    workspace.create()
    ended = []
    with FileLock(workspace.locks / "services.lock"):
        records = read_records(workspace)
        marked = marked_processes(workspace)
        for name in reversed(SERVICES):  # the runner first, so that it starts nothing new
            record = records.get(name, Record())
            recorded = record.process()
            processes = ([recorded] if recorded else []) + marked.get(name, [])
            if processes:
                end(processes)
                ended.append(name)
                progress(f"{name}: ended")
            records[name] = Record(port=record.port, release=record.release)
        write_records(workspace, records)
    return ended


def was_started(workspace: Workspace, name: str) -> bool:
    """Whether `up` started this service and nobody has taken it down since, be it alive or not."""
    return read_records(workspace).get(name, Record()).pid is not None


def restart(workspace: Workspace, name: str) -> None:
    """End what is left of one service and start it again on its port."""
    with FileLock(workspace.locks / "services.lock"):
        process = read_records(workspace).get(name, Record()).process()
        leftovers = ([process] if process else []) + marked_processes(workspace).get(name, [])
        if leftovers:
            end(leftovers)
    ensure_up(workspace, (name,))


def environment(workspace: Workspace, services: Services) -> dict[str, str]:
    """The variables that a process of this workspace needs before it imports prefect, mlflow or diffusers.

    Telemetry is off without exception; where the user has set one of the others already, that stays.
    """
    api = f"{services.prefect_url}/api" if services.prefect_url else ""
    mine = {
        "SAFELIGHT_HOME": str(workspace.home),
        "PREFECT_HOME": str(workspace.prefect_home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",  # the word: MLflow takes no other
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    }
    if api:
        mine["PREFECT_API_URL"] = api
        if not _elsewhere("prefect"):
            mine["SAFELIGHT_OWN_PREFECT"] = api
    if services.mlflow_url:
        mine["MLFLOW_TRACKING_URI"] = mine["MLFLOW_REGISTRY_URI"] = services.mlflow_url
    preferred = {
        "HF_HUB_OFFLINE": "1",
        "PREFECT_RUNNER_POLL_FREQUENCY": "3",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the least that Prefect accepts
        "PREFECT_LOGGING_EXTRA_LOGGERS": "components,flows",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # background threads speak outside of any flow
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin cost nine times the CPU on a busy machine
    }
    direct = [part for part in os.environ.get("NO_PROXY", "").split(",") if part]
    mine["NO_PROXY"] = mine["no_proxy"] = ",".join(dict.fromkeys([*direct, LOOPBACK, "localhost"]))
    return {name: os.environ.get(name, value) for name, value in preferred.items()} | mine


def adopt_environment(workspace: Workspace, services: Services) -> None:
    """Put `environment` into this process; prefect and mlflow must not have been imported yet."""
    os.environ.update(environment(workspace, services))


def beat_file(workspace: Workspace) -> Path:
    """Touched by the deployment runner at every poll."""
    return workspace.home / "runner.beat"


def refuse_public_address(host: str) -> None:
    """Raises BadInput unless `host` is this machine only: none of the servers asks who is calling."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise BadInput(
            f"--host {host}: other machines could reach services that ask for no password; keep {LOOPBACK} and put a"
            " reverse proxy with authentication, or an SSH tunnel, in front"
        )


# starting ---------------------------------------------------------------------------------------------------------


class _Start:
    """One `up`: services start side by side, each in a thread that waits for it; records are written as they change."""

    def __init__(self, workspace: Workspace, progress: Progress):
        self.workspace = workspace
        self.progress = progress
        self.records = read_records(workspace)
        self.mutex = threading.Lock()
        self.stop = threading.Event()

    def run(self, names: Iterable[str]) -> None:
        futures: dict[str, Future[None]] = {}
        with ThreadPoolExecutor(len(SERVICES)) as pool:
            for name in names:
                service = SERVICES[name]
                futures[name] = pool.submit(self._bring_up, service, futures.get(service.after or ""))
            try:
                for future in futures.values():
                    future.result()
            except BaseException:
                self.stop.set()
                raise

    def _bring_up(self, service: Service, predecessor: Future[None] | None) -> None:
        if predecessor is not None:
            predecessor.result()
        record = self.records.get(service.name, Record())
        started = time.monotonic()
        found = record.process() is not None
        if not found:
            record = self._launch(service, record)
        for _ in range(3):
            if self._wait(service, record, started + service.patience_s):
                if service.name == "prefect":
                    prefect_api.prepare(url_of(record))
                self.progress(f"{service.name}: up after {time.monotonic() - started:.0f} s  {url_of(record)}".rstrip())
                return
            if found and record.process() is None:  # it was on its way out when we came
                found, record = False, self._launch(service, record)
            elif _port_conflict(self.workspace, service):
                record = self._launch(service, Record(port=(record.port or 0) + 1, release=record.release))
            else:
                break
        log = self.workspace.logs / f"{service.name}.log"
        raise ServiceUnavailable(
            f"{service.name} did not come up within {service.patience_s:.0f} s: {last_line(log) or 'its log is empty'}"
            f" ({log}); mend that and run `safelight up` again"
        )

    def _launch(self, service: Service, record: Record) -> Record:
        workspace = self.workspace
        port = self._free_port(service, record.port) if service.port else None
        if service.name == "mlflow":
            _prepare_mlflow_database(workspace, record.release)
        services = Services(prefect_url=current(workspace).prefect_url, mlflow_url=current(workspace).mlflow_url)
        extra = {
            MARK: f"{workspace.home}::{service.name}",
            "PYTHONUNBUFFERED": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
        }
        variables = os.environ | environment(workspace, services) | extra
        for meant_for_the_command in ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_INTERNAL_LOGGING_LEVEL"):
            variables.pop(meant_for_the_command, None)
        if service.name == "prefect":
            variables.pop("PREFECT_API_URL", None)
            variables.setdefault("PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", LEASES_ON_DISK)
            variables.setdefault("PREFECT_SERVER_UI_API_URL", f"http://{LOOPBACK}:{port}/api")  # else port 4200's runs
        self.progress(f"{service.name}: starting" + (f" on port {port}" if port else ""))
        with (workspace.logs / f"{service.name}.log").open("ab") as log:
            process = subprocess.Popen(
                service.command(workspace, port or 0),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=variables,
                cwd=workspace.home,
            )
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie while this command lives
        record = Record(port, process.pid, psutil.Process(process.pid).create_time(), _release(service))
        self._remember(service, record)
        return record

    def _free_port(self, service: Service, remembered: int | None) -> int:
        assert service.port is not None
        with self.mutex:
            taken = {record.port for name, record in self.records.items() if name != service.name}
            first = remembered or service.port
            for port in range(first, first + PORTS_TRIED):
                if port not in taken and _bindable(port):
                    if port != first:
                        self.progress(f"{service.name}: port {first} is taken by another program, {port} is free")
                    self.records[service.name] = Record(port=port)
                    return port
        raise ServiceUnavailable(
            f"{service.name}: no free port from {first} to {first + PORTS_TRIED}; free one of them"
        )

    def _wait(self, service: Service, record: Record, deadline: float) -> bool:
        while time.monotonic() < deadline and not self.stop.is_set():
            if record.process() is None:
                return False
            if _healthy(self.workspace, service, record):
                return True
            time.sleep(POLL_S)
        return False

    def _remember(self, service: Service, record: Record) -> None:
        with self.mutex:
            self.records[service.name] = record
            write_records(self.workspace, self.records)


def _prepare_mlflow_database(workspace: Workspace, served_by: str | None) -> None:
    """Create MLflow's tables in a file that appears whole, or upgrade them after keeping a copy, in one process."""
    database = workspace.home / "mlflow.db"
    if database.exists() and served_by in (None, version("mlflow")):
        return
    with FileLock(workspace.locks / "mlflow-database.lock"):
        target = workspace.home / ".mlflow.db.part"
        if database.exists():
            shutil.copy2(database, workspace.home / f"mlflow.db.before-{version('mlflow')}")
            target = database
        else:
            for leftover in workspace.home.glob(".mlflow.db.part*"):
                leftover.unlink()
        variables = os.environ | environment(workspace, Services())
        done = subprocess.run(
            _python("-m", "mlflow", "db", "upgrade", f"sqlite:///{target}"),
            env=variables,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        with (workspace.logs / "mlflow.log").open("a", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            raise ServiceUnavailable(
                f"mlflow: its database {database} could not be prepared:"
                f" {last_line(workspace.logs / 'mlflow.log')}; a copy from before is kept beside it"
            )
        if target != database:
            target.replace(database)


# health -----------------------------------------------------------------------------------------------------------


def _healthy(workspace: Workspace, service: Service, record: Record) -> bool:
    process = record.process()
    if process is None:
        return False
    if service.port is None:
        try:
            beat = beat_file(workspace).stat().st_mtime
        except OSError:
            return False
        return beat >= (record.created or 0) - CLOCK_SLACK_S and time.time() - beat < RUNNER_BEAT_S
    return record.port is not None and _answers(record.port, service.health) and _listens(process, record.port)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _listens(process: psutil.Process, port: int) -> bool:
    """Whether it is this process, or a child of it, that holds the port."""
    try:
        family = [process, *process.children(recursive=True)]
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for member in family
            for connection in member.net_connections("tcp")
        )
    except psutil.AccessDenied:
        return True  # not ours to look into on this system; it answered
    except psutil.Error:
        return False


def _status_of(workspace: Workspace, service: Service, record: Record) -> ServiceStatus:
    if outside := _elsewhere(service.name):
        return ServiceStatus(
            service.name, "elsewhere", outside, None, "set by an environment variable; not started here"
        )
    if not _installed(service.name):
        return ServiceStatus(service.name, "absent", "", None, "not part of this installation")
    process = record.process()
    if process is None:
        return ServiceStatus(service.name, "down", "", None, "`safelight up` starts it")
    healthy = _healthy(workspace, service, record)
    detail = "healthy" if healthy else last_line(workspace.logs / f"{service.name}.log")
    return ServiceStatus(service.name, "up" if healthy else "starting", url_of(record), process.pid, detail)


def _elsewhere(name: str) -> str:
    """The address of a server that the user runs for several workspaces, or ''."""
    if name == "mlflow":
        return os.environ.get("SAFELIGHT_MLFLOW_URI", "").rstrip("/")
    if name == "prefect":
        address = os.environ.get("PREFECT_API_URL", "").rstrip("/")
        return "" if address == os.environ.get("SAFELIGHT_OWN_PREFECT") else address
    return ""


def _require_answer(name: str, address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except OSError as error:
        variable = "SAFELIGHT_MLFLOW_URI" if name == "mlflow" else "PREFECT_API_URL"
        raise ServiceUnavailable(
            f"{variable} names {address}, which does not answer ({error}); start it or unset it"
        ) from None


def _installed(name: str) -> bool:
    return name != "dashboard" or importlib.util.find_spec("dashboard.asgi") is not None


def _release(service: Service) -> str | None:
    try:
        return version(service.package)
    except PackageNotFoundError:
        return None


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _port_conflict(workspace: Workspace, service: Service) -> bool:
    """Whether a server lost its port to another between our look and its own; what it says while ending comes after."""
    told = last_lines(workspace.logs / f"{service.name}.log", PARTING_LINES)
    return service.port is not None and any("in use" in line.lower() for line in told)
