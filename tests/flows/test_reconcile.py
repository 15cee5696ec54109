"""`safelight doctor`: what a crash left behind is found, and mended when asked."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from components.catalog import runs
from components.catalog.models import Run, now
from components.families.bases import safetensors_fault
from components.stages import Bench
from flows import reconcile
from flows.prefect_api import call, slot_name
from flows.tracking.server import RUN_TAG
from tests.conftest import Served


def open_run(bench: Bench, **values: Any) -> str:
    run_uid = runs.open_run(bench.catalog, name="signs", kind="retrain", recipe={}, git_commit=None)
    if values:
        with bench.catalog.write() as session:
            run = session.get_one(Run, run_uid)
            for name, value in values.items():
                setattr(run, name, value)
    return run_uid


def run_row(bench: Bench, run_uid: str) -> Run:
    with bench.catalog.read() as session:
        return session.get_one(Run, run_uid)


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def findings(bench: Bench, about: str, *, fix: bool = False) -> list[reconcile.Finding]:
    return [f for f in reconcile.examine(bench.workspace, fix=fix) if about in f"{f.what} {f.where}"]


def test_a_run_whose_process_is_gone_becomes_crashed(bench: Bench):
    run_uid = open_run(bench, pid=dead_pid())
    assert [finding.fixed for finding in findings(bench, run_uid)] == [False]
    assert run_row(bench, run_uid).status == "running"
    assert [finding.fixed for finding in findings(bench, run_uid, fix=True)] == [True]
    row = run_row(bench, run_uid)
    assert (row.status, row.error) == ("crashed", reconcile.CRASH_NOTE) and row.ended_at is not None
    assert findings(bench, run_uid) == []


def test_a_run_that_lives_is_left_alone(bench: Bench):
    run_uid = open_run(bench)
    assert findings(bench, run_uid, fix=True) == [] and run_row(bench, run_uid).status == "running"


def test_a_process_born_after_the_last_heartbeat_is_not_the_runs_own(bench: Bench):
    run_uid = open_run(bench, heartbeat_at=now() - timedelta(days=2))  # this test's own process is younger
    assert reconcile.is_dead(run_row(bench, run_uid))


def test_a_run_on_another_host_is_given_a_quarter_of_an_hour(bench: Bench):
    silent = open_run(bench, host="elsewhere", heartbeat_at=now() - timedelta(minutes=16))
    spoken = open_run(bench, host="elsewhere", heartbeat_at=now() - timedelta(minutes=14))
    assert reconcile.is_dead(run_row(bench, silent)) and not reconcile.is_dead(run_row(bench, spoken))


def test_temporary_files_are_deleted_once_nothing_runs(bench: Bench):
    folder = bench.workspace.objects / "ab"
    folder.mkdir()
    old, young = folder / ".cdef.1.part", folder / ".cdef.2.part"
    for path in (old, young):
        path.write_bytes(b"half")
    an_hour_ago = time.time() - 3600
    os.utime(old, (an_hour_ago, an_hour_ago))
    run_uid = open_run(bench)
    assert findings(bench, "temporary files", fix=True) == [] and old.exists()
    runs.close_run(bench.catalog, run_uid, "completed")
    assert [finding.mend for finding in findings(bench, "temporary files", fix=True)] == ["deleted 1 files, 4 bytes"]
    assert not old.exists() and young.exists()


def test_a_catalog_of_a_newer_safelight_is_refused_in_one_line(bench: Bench):
    with bench.catalog.write() as session:
        session.connection().exec_driver_sql("UPDATE catalog_alembic_version SET version_num = '9999'")
    found = reconcile.examine(bench.workspace, fix=True)
    assert any("revision 9999" in f.what and not f.fixed and "newer Safelight" in f.mend for f in found)


def test_an_empty_catalog_is_brought_to_the_newest_revision(workspace):
    found = [f for f in reconcile.examine(workspace, fix=True) if "revision none" in f.what]
    assert [f.fixed for f in found] == [True]
    assert [f for f in reconcile.examine(workspace) if "revision" in f.what] == []


def test_an_unreadable_schedule_is_named(bench: Bench):
    folder = bench.workspace.home / "schedules"
    folder.mkdir()
    (folder / "icons.json").write_text("{")
    assert [f.where for f in findings(bench, "schedule")] == [str(folder / "icons.json")]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda data: data, ""),
        (lambda data: data[:-1], "its header promises"),
        (lambda data: data + b"x", "its header promises"),
        (lambda data: data[:4], "its header says"),
        (lambda data: data[:8] + b"?" * (len(data) - 8), "not readable"),
        (lambda data: b"\xff" * 8 + data[8:], "its header says"),
    ],
)
def test_a_damaged_weight_file_is_seen_from_its_header(tmp_path: Path, damage: Any, fault: str):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(damage(len(header).to_bytes(8, "little") + header + bytes(8)))
    assert fault in safetensors_fault(path) and bool(fault) == bool(safetensors_fault(path))


# against real servers ---------------------------------------------------------------------------------------------


@pytest.fixture
def served_bench(served: Served) -> Bench:
    return Bench.open(served.workspace)


def mlflow_call(root: str, path: str, body: dict[str, Any]) -> Any:
    request = Request(f"{root}/api/2.0/mlflow/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


@pytest.mark.services
def test_prefect_is_told_that_a_crashed_run_has_crashed(served: Served, served_bench: Bench):
    root = served.urls.prefect_url
    flow = call(root, "flows/", {"name": "doctor-test"})
    row = call(root, "flow_runs/", {"flow_id": flow["id"], "state": {"type": "RUNNING", "name": "Running"}})
    task = call(
        root,
        "task_runs/",
        {
            "flow_run_id": row["id"],
            "task_key": "t",
            "dynamic_key": "0",
            "state": {"type": "RUNNING", "name": "Running"},
        },
    )
    run_uid = open_run(served_bench, pid=dead_pid(), prefect_flow_run_id=row["id"])
    found = reconcile.examine(served.workspace, fix=True)
    assert any(row["name"] in f.what and f.fixed for f in found)
    state = {
        path: call(root, f"{path}/filter", {path: {"id": {"any_": [entry["id"]]}}})[0]["state_type"]
        for path, entry in (("flow_runs", row), ("task_runs", task))
    }
    assert state == {"flow_runs": "CRASHED", "task_runs": "CRASHED"}
    assert run_row(served_bench, run_uid).status == "crashed"


@pytest.mark.services
def test_a_slot_that_nobody_uses_is_released(served: Served):
    root = served.urls.prefect_url
    call(root, "v2/concurrency_limits/increment", {"names": [slot_name()], "slots": 1, "mode": "concurrency"})
    found = reconcile.examine(served.workspace, fix=True)
    assert any(slot_name() in f.what and f.fixed for f in found)
    limits = {limit["name"]: limit["active_slots"] for limit in call(root, "v2/concurrency_limits/filter", {})}
    assert limits[slot_name()] == 0


@pytest.mark.services
def test_mlflow_is_told_that_a_crashed_run_has_ended(served: Served, served_bench: Bench):
    root = served.urls.mlflow_url
    experiment = mlflow_call(root, "experiments/create", {"name": f"doctor-{time.time_ns()}"})["experiment_id"]
    run_uid = open_run(served_bench, pid=dead_pid())
    created = mlflow_call(
        root,
        "runs/create",
        {
            "experiment_id": experiment,
            "start_time": int(time.time() * 1000),
            "tags": [{"key": RUN_TAG, "value": run_uid}],
        },
    )
    found = reconcile.examine(served.workspace, fix=True)
    assert any("MLflow says RUNNING" in f.what and f.fixed for f in found)
    run_id = created["run"]["info"]["run_id"]
    with urlopen(f"{root}/api/2.0/mlflow/runs/get?run_id={run_id}", timeout=30) as answer:
        assert json.loads(answer.read())["run"]["info"]["status"] in ("KILLED", "FAILED")
    assert socket.gethostname() == run_row(served_bench, run_uid).host
