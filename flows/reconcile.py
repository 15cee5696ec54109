"""What a crash, a full disk or a wrong version left behind: found by `safelight doctor`, mended with `--fix`.

The catalog is the owner of what happened; Prefect's and MLflow's word is brought into line with it.
"""

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import psutil
from sqlalchemy import select

from components.catalog import runs as run_rows
from components.catalog.database import MIGRATIONS
from components.catalog.models import ModelVersion, Promotion, Run, now
from components.errors import SafelightError
from components.families.bases import safetensors_fault
from components.stages import Bench
from components.workspace import Workspace
from flows import deployments, prefect_api, processes, services
from flows.tracking import recovery, registry

SILENT_ELSEWHERE = timedelta(minutes=15)  # a run on another host that was not heard of for so long is taken for dead
LEFTOVER_AGE_S = 60.0
LEAST_FREE_BYTES = 2_000_000_000
PREFECT_PAGE = 200
CRASHED = {"type": "CRASHED", "name": "Crashed", "message": "The process that ran it is gone."}
WORKER = "components.training.worker"
CRASH_NOTE = "its process ended without a word; run the same command again, it goes on from the last commit"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong: what, where, how it is mended, and whether that has been done."""

    what: str
    where: str
    mend: str
    fix: Callable[[], str] | None = None  # does it and says what it did
    fixed: bool = False


Check = Callable[[Bench], Iterator[Finding]]
PrefectApi = Callable[..., Any]  # `prefect_api.call` on a server


def examine(
    workspace: Workspace, *, fix: bool = False, progress: Callable[[str], None] = lambda _: None
) -> list[Finding]:
    """Every finding, in the order in which they should be mended; with `fix` each is mended as it is found."""
    bench = Bench.open(workspace)
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        progress(f"looking at {name}")
        try:
            for finding in check(bench):
                findings.append(_mended(finding) if fix and finding.fix else finding)
        except (SafelightError, OSError) as error:
            findings.append(
                Finding(f"{name} could not be looked at: {error}", str(workspace.home), "mend that and look again")
            )
        if name == SCHEMA_CHECK and any(
            not finding.fixed for finding in findings if finding.where == workspace.catalog_url
        ):
            break  # the other checks read the catalog
    return findings


def process_of(run: Run) -> psutil.Process | None:
    """The living process of a run on this host; not another one that got its pid after the run's last heartbeat."""
    if run.host != socket.gethostname():
        return None
    try:
        process = psutil.Process(run.pid)
        born = datetime.fromtimestamp(process.create_time(), UTC)
        if process.status() == psutil.STATUS_ZOMBIE or born > run.heartbeat_at + timedelta(seconds=2):
            return None
        return process
    except psutil.Error:
        return None


def is_dead(run: Run) -> bool:
    """Whether a run that the catalog calls running cannot be."""
    if run.host == socket.gethostname():
        return process_of(run) is None
    return now() - run.heartbeat_at > SILENT_ELSEWHERE


# the checks -------------------------------------------------------------------------------------------------------


def _versions(_: Bench) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for line in requires("safelight") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "nothing"
        if found == "nothing" or not requirement.specifier.contains(found, prereleases=True):
            yield Finding(
                f"{requirement.name}: {found} is installed, expected {requirement.specifier}",
                "this Python",
                "install with the constraints file: pip install -c constraints.txt -e .",
            )


def _schema(bench: Bench) -> Iterator[Finding]:
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    head = scripts.get_current_head()
    with bench.catalog.engine.connect() as connection:
        found = MigrationContext.configure(
            connection, opts={"version_table": "catalog_alembic_version"}
        ).get_current_revision()
    if found == head:
        return
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        yield Finding(
            f"the catalog is at revision {found}, which this version does not know",
            bench.catalog.url,
            "install the newer Safelight that wrote it, or point SAFELIGHT_HOME to another folder",
        )
        return

    def upgrade() -> str:
        bench.catalog.migrate()
        return f"brought the catalog from revision {found or 'none'} to {head}"

    yield Finding(
        f"the catalog is at revision {found or 'none'}, expected {head}", bench.catalog.url, "upgrade it", upgrade
    )


def _disk(bench: Bench) -> Iterator[Finding]:
    free = shutil.disk_usage(bench.workspace.home).free
    if free < LEAST_FREE_BYTES:
        yield Finding(
            f"{free / 1e9:.1f} GB free", str(bench.workspace.home), "free some space; a retraining writes about 1 GB"
        )


def _runs(bench: Bench) -> Iterator[Finding]:
    for run in run_rows.running(bench.catalog):
        if not is_dead(run):
            continue

        def close(run_uid: str = run.run_uid) -> str:
            run_rows.close_run(bench.catalog, run_uid, "crashed", error=CRASH_NOTE)
            return "set its status to crashed"

        yield Finding(
            f"run {run.run_uid} ({run.name}) is in state running, its process {run.pid} is gone",
            f"catalog, host {run.host}",
            "set its status to crashed",
            close,
        )


def _workers(bench: Bench) -> Iterator[Finding]:
    """Training children whose run has ended; their lifeline should have ended them."""
    living = {run.pid for run in _living(bench)}
    for process in psutil.process_iter():
        try:
            ours = (
                WORKER in process.cmdline()
                and process.environ().get("SAFELIGHT_HOME") == str(bench.workspace.home)
                and time.time() - process.create_time() > LEFTOVER_AGE_S
            )
            orphan = ours and not living & {parent.pid for parent in process.parents()}
        except (psutil.Error, OSError):
            continue
        if orphan:

            def end(process: psutil.Process = process) -> str:
                for member in [*process.children(recursive=True), process]:
                    member.kill()
                return f"ended process {process.pid}"

            yield Finding(
                f"a training process lives on without its run: {process.pid}",
                f"host {socket.gethostname()}",
                "end it",
                end,
            )


def _services(bench: Bench) -> Iterator[Finding]:
    for state in services.status(bench.workspace):
        died = state.state == "down" and services.was_started(bench.workspace, state.name)
        if not died and state.state != "starting":
            continue

        def restart(name: str = state.name) -> str:
            services.restart(bench.workspace, name)
            return f"started {name} again"

        log = bench.workspace.logs / f"{state.name}.log"
        yield Finding(
            f"{state.name} {'died' if died else 'does not answer'}: {processes.last_line(log) or 'no word in its log'}",
            str(log),
            "start it again",
            restart,
        )


def _asking_prefect(check: Callable[[Bench, PrefectApi], Iterator[Finding]]) -> Check:
    """A check that needs Prefect; while that is not up there is nothing to find."""

    def asking(bench: Bench) -> Iterator[Finding]:
        root = services.current(bench.workspace).prefect_url
        if root:
            yield from check(bench, partial(prefect_api.call, root))

    return asking


def _flow_runs(bench: Bench, api: PrefectApi) -> Iterator[Finding]:
    """Prefect runs that are still Running although the catalog, which knows better, says that their run has ended."""
    busy = _in_state(api, "flow_runs", ("RUNNING", "CANCELLING"))
    with bench.catalog.read() as session:
        ours = {
            run.prefect_flow_run_id: run.status
            for run in session.scalars(select(Run).where(Run.prefect_flow_run_id.in_([row["id"] for row in busy])))
        }
    for row in busy:
        ended = ours.get(row["id"], "running")
        if ended == "running":
            continue

        def crash(flow_run_id: str = row["id"]) -> str:
            tasks = _in_state(api, "task_runs", ("RUNNING", "PENDING"), flow_runs={"id": {"any_": [flow_run_id]}})
            for path in (*(f"task_runs/{task['id']}" for task in tasks), f"flow_runs/{flow_run_id}"):
                api(f"{path}/set_state", {"state": CRASHED, "force": True})
            return f"set it and {len(tasks)} of its tasks to Crashed"

        yield Finding(
            f"flow run {row['name']} is in state {row['state_name']}, the run itself is {ended}",
            "Prefect",
            "set it to Crashed",
            crash,
        )


def _in_state(api: PrefectApi, kind: str, states: tuple[str, ...], **conditions: Any) -> list[dict[str, Any]]:
    """Prefect's "flow_runs" or "task_runs" in one of these states."""
    in_state = {kind: {"state": {"type": {"any_": states}}}}
    return api(f"{kind}/filter", {"limit": PREFECT_PAGE} | in_state | conditions)


def _slots(bench: Bench, api: PrefectApi) -> Iterator[Finding]:
    """This host's slot, taken although nothing runs here."""
    if any(run.host == socket.gethostname() for run in _living(bench)):
        return
    for limit in api("v2/concurrency_limits/filter", {"limit": PREFECT_PAGE}):
        if limit["name"] == prefect_api.slot_name() and limit["active_slots"]:

            def release(limit_id: str = limit["id"]) -> str:
                api(f"v2/concurrency_limits/{limit_id}", {"active_slots": 0}, "PATCH")
                return "released it"

            yield Finding(f"the slot {limit['name']} is taken and no run is there", "Prefect", "release it", release)


def _tracking(bench: Bench) -> Iterator[Finding]:
    """Journals that MLflow has not seen to the end, and MLflow runs in state RUNNING whose run has ended."""
    for run_uid in recovery.pending(bench):
        if _is_running(bench, run_uid):
            continue

        def send(run_uid: str = run_uid) -> str:
            return f"sent {recovery.catch_up(bench, run_uid)} entries"

        yield Finding(
            f"run {run_uid}: its journal is not wholly in MLflow",
            str(bench.workspace.run_dir(run_uid)),
            "send the rest (MLflow must be up)",
            send,
        )
    for run_uid in recovery.left_running(bench):

        def end() -> str:
            ended = dict(recovery.heal(bench))
            return f"MLflow ended {len(ended)} runs" if ended else "ended together with the one before"

        yield Finding(
            f"run {run_uid}: MLflow says RUNNING, the run itself has ended", "MLflow", "end it there too", end
        )


def _champions(bench: Bench) -> Iterator[Finding]:
    """Champion aliases that somebody moved in MLflow itself: the audit trail gets to know."""
    if not services.current(bench.workspace).mlflow_url:
        return
    with bench.catalog.read() as session:
        names = sorted(set(session.scalars(select(ModelVersion.name))))
        recorded = {row.name: row.version for row in session.scalars(select(Promotion).order_by(Promotion.id))}
    for name in names:
        champion = registry.aliases(bench.workspace, name).get("champion")
        if champion is None or champion == recorded.get(name):
            continue

        def record(name: str = name, champion: int = champion) -> str:
            with bench.catalog.write() as session:
                session.add(
                    Promotion(
                        name=name,
                        version=champion,
                        previous_version=recorded.get(name),
                        decided_by="outside",
                        reason="the alias was moved in MLflow",
                    )
                )
            registry.mirror_versions(bench, name)
            return "wrote it down as promoted outside"

        yield Finding(
            f"{name}: version {champion} is champion in MLflow, the audit trail says {recorded.get(name) or 'none'}",
            "MLflow registry",
            "write it down as promoted outside",
            record,
        )


def _leftovers(bench: Bench) -> Iterator[Finding]:
    """Temporary files of writes that never ended. While a run is alive they may be its own."""
    if _living(bench):
        return
    old = time.time() - LEFTOVER_AGE_S
    home = bench.workspace.home
    parts = [
        path
        for root in (bench.workspace.objects, home / "runs", home / "thumbs", home / "schedules", home / "exports")
        for path in root.rglob("*.part")
        if path.is_file() and path.stat().st_mtime < old
    ]
    if parts:

        def delete() -> str:
            freed = sum(path.stat().st_size for path in parts)
            for path in parts:
                path.unlink(missing_ok=True)
            return f"deleted {len(parts)} files, {freed} bytes"

        yield Finding(
            f"{len(parts)} temporary files of writes that were cut off", str(parts[0].parent), "delete them", delete
        )


def _schedules(bench: Bench) -> Iterator[Finding]:
    readable = {entry.name for entry in deployments.list_schedules(bench.workspace)}
    for path in sorted(deployments.schedules_dir(bench.workspace).glob("*.json")):
        if path.stem not in readable:
            yield Finding("a schedule cannot be read", str(path), "delete the file and store the schedule again")


def _base(_: Bench) -> Iterator[Finding]:
    """The embedded base: every safetensors header against the file's size. Weights are hashed before each training."""
    from components.families.bases import EMBEDDED

    files = sorted(EMBEDDED.rglob("*.safetensors"))
    if not files:
        yield Finding(
            "the embedded base model has no weights",
            str(EMBEDDED),
            "install Safelight again, or run `safelight pretrain`",
        )
    for path in files:
        if fault := safetensors_fault(path):
            yield Finding(f"the embedded base model is damaged: {fault}", str(path), "install Safelight again")


SCHEMA_CHECK = "the catalog's schema"
CHECKS: dict[str, Check] = {
    "versions": _versions,
    SCHEMA_CHECK: _schema,
    "disk space": _disk,
    "runs": _runs,
    "training processes": _workers,
    "services": _services,
    "Prefect's runs": _asking_prefect(_flow_runs),
    "concurrency slots": _asking_prefect(_slots),
    "tracking": _tracking,
    "champions": _champions,
    "temporary files": _leftovers,
    "schedules": _schedules,
    "the base model": _base,
}


def _mended(finding: Finding) -> Finding:
    assert finding.fix is not None
    try:
        return replace(finding, mend=finding.fix(), fixed=True)
    except (SafelightError, OSError, psutil.Error) as error:
        return replace(finding, mend=f"{finding.mend} (tried: {error})")


def _living(bench: Bench) -> list[Run]:
    return [run for run in run_rows.running(bench.catalog) if not is_dead(run)]


def _is_running(bench: Bench, run_uid: str) -> bool:
    with bench.catalog.read() as session:
        run = session.get(Run, run_uid)
    return run is not None and run.status == "running" and not is_dead(run)
