"""The journal of a run: one JSON line per fact, appended before anything is told to a tracker.

The sender in `flows.tracking` and the live charts read it; nothing but its own run writes it. A line that a crash left
half-written is ignored by readers and cut off when the journal is opened again.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.errors import StorageFull
from components.workspace import Workspace

FILE_NAME = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line: `seq` counts from 0, `t_ms` is Unix time in milliseconds, `end` the byte offset behind the line."""

    seq: int
    t_ms: int
    kind: str
    body: dict[str, Any]
    end: int


class Journal:
    """An append-only file. `append` may be called from several threads; `sync` makes what was appended durable."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._next, self._end = 0, 0
        for entry in read_entries(path):
            self._next, self._end = entry.seq + 1, entry.end
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, self._end)

    @property
    def empty(self) -> bool:
        return self._next == 0

    def append(self, kind: str, body: dict[str, Any], *, t_ms: int | None = None) -> Entry:
        """Add a line and hand it to the operating system: it survives this process, though not yet a power cut.

        Raises StorageFull; the journal then still ends with a whole line.
        """
        with self._lock:
            seq, t_ms = self._next, now_ms() if t_ms is None else t_ms
            fields = {"seq": seq, "t_ms": t_ms, "kind": kind, "body": body}
            line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
            try:
                written = os.pwrite(self._descriptor, line, self._end)
            except OSError as error:
                raise StorageFull(
                    f"{self.path}: cannot append {len(line)} bytes: {error.strerror}; free some space "
                    "and run the same command again"
                ) from error
            if written < len(line):
                os.ftruncate(self._descriptor, self._end)
                raise StorageFull(
                    f"{self.path}: no space left for {len(line)} bytes; free some space and run the same command again"
                )
            self._next, self._end = seq + 1, self._end + len(line)
            return Entry(seq, t_ms, kind, body, self._end)

    def sync(self) -> None:
        """Wait until everything appended is on the disk: done where a stage ends, not for every step."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Make everything durable and let go of the file. Closing twice is harmless."""
        with self._lock:
            if self._descriptor >= 0:
                os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1


def journal_path(workspace: Workspace, run_uid: str) -> Path:
    return workspace.run_dir(run_uid) / FILE_NAME


def journals(workspace: Workspace) -> list[Path]:
    """The journals of all runs, oldest first: a run's uid, its folder's name, begins with the time."""
    return sorted((workspace.home / "runs").glob(f"*/{FILE_NAME}"))


def read_entries(path: Path, offset: int = 0) -> Iterator[Entry]:
    """The whole lines from a byte offset on (0, or an `Entry.end`); none where there is no journal."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            try:
                fields = json.loads(line)
                entry = Entry(fields["seq"], fields["t_ms"], fields["kind"], fields["body"], offset)
            except (ValueError, KeyError, TypeError):
                return
            if not line.endswith(b"\n"):
                return
            yield entry


def now_ms() -> int:
    return time.time_ns() // 1_000_000
