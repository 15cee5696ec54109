"""Services: what `up` starts is healthy, remembered, and the only thing that `down` ends."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from components.errors import BadInput, ServiceUnavailable
from components.workspace import Workspace
from flows import processes, services
from flows.prefect_api import call, slot_name
from flows.processes import Record
from flows.services import Service, Services
from tests.conftest import Served

DESK = "dashboard"  # the service whose place a small web server takes, so that a test starts in a second


def web_server(_: Workspace, port: int) -> list[str]:
    return [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]


def short_lived(_: Workspace, __: int) -> list[str]:
    return [sys.executable, "-c", "print('no such colour'); raise SystemExit(3)"]


@pytest.fixture
def desk(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A workspace whose only service is a small web server."""
    small = Service(DESK, free_port(), "/", 20, web_server, "streamlit")
    monkeypatch.setattr(services, "SERVICES", {DESK: small})
    monkeypatch.setattr(services, "_installed", lambda name: True)
    yield workspace
    services.down(workspace)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def record_of(workspace: Workspace) -> Record:
    return processes.read_records(workspace)[DESK]


def replace_command(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setattr(services, "SERVICES", {DESK: replace(services.SERVICES[DESK], **changes)})


def test_up_starts_a_healthy_service_and_a_second_up_leaves_it_alone(desk: Workspace):
    running = services.up(desk)
    first = record_of(desk)
    assert urlopen(running.dashboard_url, timeout=5).status == 200
    assert services.up(desk) == running and record_of(desk) == first
    assert [state.state for state in services.status(desk)] == ["up"]


def test_down_ends_the_process_and_the_port_is_remembered(desk: Workspace):
    address = services.up(desk).dashboard_url
    process = psutil.Process(record_of(desk).pid)
    assert services.down(desk) == [DESK]
    assert not process.is_running() and services.down(desk) == []
    assert services.current(desk) == Services()
    assert services.up(desk).dashboard_url == address


@pytest.mark.parametrize("known", [True, False], ids=["remembered", "default"])
def test_a_port_that_another_program_holds_is_given_up_and_said(desk: Workspace, known: bool):
    before = f"http://127.0.0.1:{services.SERVICES[DESK].port}"
    if known:
        assert services.up(desk).dashboard_url == before
        services.down(desk)
    told: list[str] = []
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", int(before.rpartition(":")[2])))
        squatter.listen()
        after = services.up(desk, progress=told.append).dashboard_url
    assert after != before and urlopen(after, timeout=5).status == 200
    assert any(f"port {before.rpartition(':')[2]} is taken by another program" in line for line in told)
    assert services.up(desk).dashboard_url == after


def test_a_service_that_was_killed_comes_back_on_its_port(desk: Workspace):
    address = services.up(desk).dashboard_url
    psutil.Process(record_of(desk).pid).kill()
    time.sleep(0.2)
    assert [state.state for state in services.status(desk)] == ["down"] and services.was_started(desk, DESK)
    assert services.up(desk).dashboard_url == address


def test_a_service_that_does_not_start_is_named_with_its_last_words(desk: Workspace, monkeypatch: pytest.MonkeyPatch):
    replace_command(monkeypatch, command=short_lived)
    with pytest.raises(ServiceUnavailable, match=r"dashboard did not come up .*no such colour.*safelight up") as error:
        services.up(desk)
    assert "\n" not in str(error.value)


def test_down_spares_a_process_that_only_inherited_the_pid(desk: Workspace):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        born = psutil.Process(stranger.pid).create_time()
        processes.write_records(desk, {DESK: Record(port=1, pid=stranger.pid, created=born - 60)})
        assert services.down(desk) == [] and stranger.poll() is None
        stranger.kill()


def test_down_finds_a_service_that_nobody_came_to_write_down(desk: Workspace):
    services.up(desk)
    process = psutil.Process(record_of(desk).pid)
    desk.services_file.unlink()
    assert services.down(desk) == [DESK] and not process.is_running()


def test_down_leaves_another_workspace_alone(desk: Workspace, tmp_path: Path):
    services.up(desk)
    assert services.down(Workspace(tmp_path / "other")) == []
    assert services.down(Workspace(tmp_path / "made").create()) == []
    assert record_of(desk).process() is not None


def test_three_commands_at_once_start_one_service(desk: Workspace):
    threads = [threading.Thread(target=services.up, args=(desk,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(processes.marked_processes(desk)[DESK]) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])
def test_an_address_that_others_can_reach_is_refused(workspace: Workspace, host: str):
    with pytest.raises(BadInput, match="ask for no password"):
        services.up(workspace, host=host)


@pytest.mark.parametrize(("variable", "need"), [("SAFELIGHT_MLFLOW_URI", "mlflow"), ("PREFECT_API_URL", "prefect")])
def test_a_shared_server_that_is_away_is_an_error_with_its_variable(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, variable: str, need: str
):
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}/api")
    with pytest.raises(ServiceUnavailable, match=f"{variable} names .* does not answer"):
        services.ensure_up(workspace, (need,))


def test_the_environment_keeps_every_library_quiet_and_respects_the_user(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "intranet")
    variables = services.environment(workspace, Services("http://127.0.0.1:4200", "http://127.0.0.1:5000"))
    assert variables["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert variables["PREFECT_HOME"] == str(workspace.prefect_home)
    assert (variables["DO_NOT_TRACK"], variables["MLFLOW_DISABLE_TELEMETRY"]) == ("true", "true")
    assert variables["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert variables["HF_HUB_OFFLINE"] == "0"
    assert variables["NO_PROXY"] == "intranet,127.0.0.1,localhost"


def test_an_adopted_prefect_is_not_taken_for_a_shared_one(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    for name, value in services.environment(workspace, Services("http://127.0.0.1:4200")).items():
        monkeypatch.setenv(name, value)
    assert services._elsewhere("prefect") == ""
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example.org/api")
    assert services._elsewhere("prefect") == "https://prefect.example.org/api"


@pytest.mark.services
def test_prefect_and_mlflow_are_up_and_asking_again_is_quick(served: Served):
    began = time.monotonic()
    assert services.ensure_up(served.workspace) == served.urls
    assert time.monotonic() - began < 5
    states = {state.name: state.state for state in services.status(served.workspace)}
    assert states["prefect"] == states["mlflow"] == "up"


@pytest.mark.services
def test_prefect_holds_the_slot_and_the_automation_that_ends_zombies(served: Served):
    limits = call(served.urls.prefect_url, "v2/concurrency_limits/filter", {})
    assert {limit["name"]: limit["limit"] for limit in limits}[slot_name()] == 1
    automations = call(served.urls.prefect_url, "automations/filter", {})
    assert [a["actions"][0]["state"] for a in automations if "without heartbeats" in a["name"]] == ["CRASHED"]


@pytest.mark.services
def test_the_pages_of_prefect_show_the_server_that_they_are_served_by(served: Served):
    assert not served.urls.prefect_url.endswith(":4200")
    with urlopen(f"{served.urls.prefect_url}/ui-settings") as answer:
        assert json.loads(answer.read())["api_url"] == f"{served.urls.prefect_url}/api"


@pytest.mark.services
def test_a_foreign_host_header_gets_nothing_from_mlflow(served: Served):
    host, port = served.urls.mlflow_url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", "/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": "evil.example:80"})
    assert connection.getresponse().status == 403


@pytest.mark.services
def test_every_server_listens_on_this_machine_only(served: Served):
    listening = [
        connection.laddr.ip
        for family in processes.marked_processes(served.workspace).values()
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) == {"127.0.0.1"}


@pytest.mark.services
def test_the_servers_are_few_and_lean(served: Served):
    running = processes.marked_processes(served.workspace)
    assert len(running["mlflow"]) <= 3 and len(running["prefect"]) <= 2
    assert json.loads(served.workspace.services_file.read_text())["mlflow_url"] == served.urls.mlflow_url
    assert os.environ.get("PREFECT_API_URL") is None


def test_a_server_that_loses_its_port_while_starting_gets_the_next_one(
    desk: Workspace, monkeypatch: pytest.MonkeyPatch
):
    taken = services.SERVICES[DESK].port

    def beaten_once(workspace: Workspace, port: int) -> list[str]:
        said = "address already in use\\nTraceback (most recent call last):\\nAssertionError\\nServer stopped!"
        return (
            [sys.executable, "-c", f"print('{said}'); raise SystemExit(1)"]
            if port == taken
            else web_server(workspace, port)
        )

    replace_command(monkeypatch, command=beaten_once)
    services.up(desk)
    assert record_of(desk).port == taken + 1


def test_a_server_that_ends_while_it_is_waited_for_is_started_again(desk: Workspace):
    services.up(desk)
    going = psutil.Process(record_of(desk).pid)
    going.suspend()  # it lives and does not answer
    end = threading.Timer(1.0, going.kill)
    end.start()
    services.up(desk)
    end.join()
    assert record_of(desk).pid != going.pid
