"""The processes of a workspace's services, the file that remembers them, and the last words in their logs."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from components.storage import atomic_write
from components.workspace import Workspace

LOOPBACK = "127.0.0.1"
MARK = "SAFELIGHT_SERVICE"  # set in the environment of everything started here: "<home>::<service>"
STOP_GRACE_S = 10.0
CLOCK_SLACK_S = 2.0  # creation times move with the system clock; a reused pid is never this close


@dataclass(frozen=True, slots=True)
class Record:
    """What `services.json` remembers of a service: its port for good, its process while there is one."""

    port: int | None = None
    pid: int | None = None
    created: float | None = None
    release: str | None = None  # version of the package that served this workspace last

    def process(self) -> psutil.Process | None:
        """The recorded process if it still lives, never another one that inherited its pid."""
        if self.pid is None or self.created is None:
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < CLOCK_SLACK_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


def read_records(workspace: Workspace) -> dict[str, Record]:
    try:
        body = json.loads(workspace.services_file.read_text(encoding="utf-8"))
        return {name: Record(**fields) for name, fields in body["services"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_records(workspace: Workspace, records: dict[str, Record]) -> None:
    addresses = {
        f"{name}_url": url_of(record) if record.pid else None for name, record in records.items() if record.port
    }
    body = {"schema": 1, "services": {name: asdict(record) for name, record in records.items()}} | addresses
    with atomic_write(workspace.services_file) as file:
        file.write(json.dumps(body, indent=2).encode())


def url_of(record: Record) -> str:
    return f"http://{LOOPBACK}:{record.port}" if record.port else ""


def marked_processes(workspace: Workspace) -> dict[str, list[psutil.Process]]:
    """Living processes that carry this workspace's mark, by service: also those nobody came to write down."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            continue
        home, _, name = mark.rpartition("::")
        if home == str(workspace.home) and process.pid != os.getpid():
            found.setdefault(name, []).append(process)
    return found


def end(processes: Sequence[psutil.Process]) -> None:
    """SIGTERM to the processes, then, after a grace, SIGKILL to them and everything below them."""
    family = {member.pid: member for process in processes for member in (process, *_children(process))}
    family.pop(os.getpid(), None)
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(list(family.values()), timeout=STOP_GRACE_S / 2)
    for process in alive:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(alive, timeout=STOP_GRACE_S / 2)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=STOP_GRACE_S / 2)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return


def last_line(path: Path) -> str:
    """The last line of a log that says something, at most 200 characters."""
    return next(iter(last_lines(path, 1)), "")


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log that say something, each at most 200 characters."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    spoken = [line.strip()[:200] for line in lines if any(character.isalnum() for character in line)]
    return spoken[-count:]
