"""Several processes that train one model: each takes its part of a step's batches, all take the same step.

The first is the process that was asked to train; `started` adds the others, workers of the same kind that get the same
request. They speak through torch.distributed with gloo on this host, in the CPU's memory, and end with the first.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from components import errors
from components.errors import SafelightError, StageFailed, Stopped

PATIENCE = timedelta(days=1)  # the others wait while the first validates and draws previews
MEETING = timedelta(minutes=2)  # for all to come to the rendezvous, torch imported
LAST_WORDS_S = 5.0  # for a process that fails to say why
RENDEZVOUS = "rendezvous"


@dataclass(frozen=True, slots=True)
class Processes:
    """The place of this process among `count`. What is alone is the first of one, and every exchange is nothing."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes checkpoints and tells what happened."""
        return self.rank == 0

    def require_same(self, what: str, value: int) -> None:
        """Raises StageFailed when the processes do not agree."""
        if self.sum(value) != value * self.count:
            raise StageFailed(
                f"process {self.rank} of {self.count} has {value} as the {what} and another one has not;"
                " run the same command again"
            )

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of the processes; all get the same answer."""
        return self.sum(float(flag)) > 0

    def sum(self, value: float) -> float:
        """Over the processes, in float64."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.item()

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes its float32 sum over the processes, the same bits in each of them."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.detach().flatten().float().cpu() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


ALONE = Processes()


@contextmanager
def joined(rank: int, count: int, folder: Path) -> Iterator[Processes]:
    """Meet the other processes in `folder`; within the block each takes its part of the threads and its own GPU.

    Raises: StageFailed when not all have come within `MEETING`.
    """
    store = distributed.FileStore(str(folder / RENDEZVOUS), count)  # pyright: ignore[reportPrivateImportUsage]
    store.set(f"here-{rank}", "")
    try:
        store.wait([f"here-{other}" for other in range(count)], MEETING)
    except RuntimeError:
        raise StageFailed(
            f"not all of the {count} training processes were there after {MEETING.seconds} s; "
            "run the same command again"
        ) from None
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        yield Processes(rank, count)
    finally:
        distributed.destroy_process_group()
        torch.set_num_threads(threads)


@contextmanager
def started(
    request: Mapping[str, Any], count: int, folder: Path, should_stop: Callable[[], bool]
) -> Iterator[Processes]:
    """This process as the first of `count`, the others started with `request` and their rank, and ended with the block.

    Raises: what one of the others failed with, and Stopped when asked to stop before all are there.
    """
    if count == 1:
        yield ALONE
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RENDEZVOUS).unlink(missing_ok=True)
    with ExitStack() as stack:
        others = [stack.enter_context(_worker(dict(request) | {"rank": rank})) for rank in range(1, count)]
        for other in others:
            other.await_ready(should_stop)
        try:
            with joined(0, count, folder) as processes:
                yield processes
        except (RuntimeError, StageFailed):  # gloo lost a process: what that one said is the cause
            for other in others:
                other.raise_its_error()
            raise


class _Worker:
    """Another process of the training, its events read as they come."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process
        self.ready = False
        self.error: SafelightError | None = None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            self.ready = self.ready or event["event"] == "ready"
            if event["event"] == "error":
                self.error = getattr(errors, event["type"], StageFailed)(event["message"])

    def await_ready(self, should_stop: Callable[[], bool]) -> None:
        while not self.ready:
            if should_stop():
                raise Stopped("stopped before the first step; run the same command to continue")
            if self.error is not None:
                raise self.error
            if not self.reader.is_alive() and not self.ready:
                raise StageFailed(f"a training process ended with code {self.process.wait()} before the first step")
            time.sleep(0.02)

    def raise_its_error(self) -> None:
        deadline = time.monotonic() + LAST_WORDS_S
        while self.error is None and self.reader.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.error is not None:
            raise self.error


@contextmanager
def _worker(request: dict[str, Any]) -> Iterator[_Worker]:
    process = subprocess.Popen(
        [sys.executable, "-m", "components.training.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        yield _Worker(process)
    finally:
        process.stdin.close()  # it ends when its lifeline does
        process.wait()
