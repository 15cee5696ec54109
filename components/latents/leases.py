"""Leases: of several processes that want the same items encoded, which one encodes which.

A lease on an item is a record lock on one byte of one file; encoder and item say which byte. It ends with its holder,
after a kill -9 too, so nothing expires and no clock is asked. Hosts that share a workspace need a file system whose
record locks reach across hosts, as those of NFS 4 do; where they do not, work is done twice, and nothing worse happens.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_TURN = threading.Lock()  # a record lock belongs to a process: of its threads, one encodes at a time


class Leases:
    """The leases of one encoder's items that this process holds; open within `with` only."""

    def __init__(self, path: Path, encoder: str):
        self._path, self._encoder = path, encoder

    def __enter__(self) -> Self:
        _TURN.acquire()
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            _TURN.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        _TURN.release()

    def take(self, key: str) -> bool:
        """Whether the item is ours from now on; False where another process has it."""
        with suppress(BlockingIOError, PermissionError):  # POSIX allows EAGAIN and EACCES
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._byte(key))
            return True
        return False

    def release(self, keys: Iterable[str]) -> None:
        for key in keys:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._byte(key))

    def wait(self, key: str) -> None:
        """Until nobody has the item. Whoever waits holds no lease, so nobody waits for ever."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self._byte(key))
        self.release([key])

    def _byte(self, key: str) -> int:
        digest = hashlib.sha256(f"{self._encoder}\0{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 2  # of 2**62: two items on one byte would only wait for each other
