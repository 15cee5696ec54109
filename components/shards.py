"""Work in shards: one function on many small requests, in processes of this machine or on a Ray cluster.

Results are handed over in the order of the shards, in the process that asked, whichever engine did the work and in how
many processes: what is committed from them is the same. A process that is lost costs the shard it had, which is done
again, so the function must do no harm when it runs twice.

`python -m components.shards` is a process of the local engine. It reads requests from stdin and writes answers to
stdout, each a pickle behind its length; it speaks to the process that started it alone, and ends when that one does.
"""

import logging
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

from components.errors import BadInput, SafelightError, StageFailed

ROOT = Path(__file__).parents[1]
LENGTH = struct.Struct(">Q")  # bytes of the pickle that follows
TRIES = 3  # processes that one shard may lose before it is given up
RAY_STORE = 128 << 20  # bytes of shared memory of a Ray that is started here: results are small
AHEAD = 4  # shards handed out for each process: one that takes long does not leave the others idle
HEAP = {  # glibc: memory that one picture has freed goes to the next one. Given back, it would be faulted in anew
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),  # bytes free at the heap's end
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # bytes; larger blocks go straight back to the system
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Shard = TypeVar("Shard")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Crew:
    """Who does the work. It changes no result, so it is part of no recipe and no stage key."""

    engine: Engine = "local"
    processes: int = 1  # of the local engine, or of a Ray that is started for the work
    ray_address: str | None = None  # of a Ray cluster that runs already; it decides by itself how many work
    gpus: tuple[str, ...] | None = None  # for local processes in turn; None: no GPU is asked for, on Ray too

    @property
    def alone(self) -> bool:
        """Whether a single process of this machine is all there is, as which the one that asks may work itself."""
        return self.engine == "local" and self.processes == 1


def run_shards(
    function: Callable[[Shard], Result],
    shards: Iterable[Shard],
    commit: Callable[[Shard, Result], None],
    crew: Crew,
    *,
    named: Callable[[Shard], str],
) -> None:
    """Call `function` on every shard elsewhere, and `commit` on each shard and its result here, in the shards' order.

    `function` is at the top of a module that the other processes can import; shards and results are small and can be
    pickled. A few shards for each process are asked for ahead, so a long iterable is never held in memory. `named`
    says in an error which shard it was.

    Raises: what `function` raised, if it is a SafelightError, and StageFailed for any other error and for a shard that
    has lost `TRIES` processes. Earlier shards are committed by then.
    """
    engine = _on_ray if crew.engine == "ray" else _in_processes
    engine(function, shards, commit, crew, named)


def _answer(function: Callable[[Any], Any], shard: Any) -> Any:
    """The function's result, or the SafelightError to raise where the shard came from."""
    try:
        return function(shard)
    except SafelightError as error:
        return error
    except Exception as error:
        traceback.print_exc()
        return StageFailed(f"{function.__qualname__}: {type(error).__name__}: {error}")


def _environment() -> dict[str, str]:
    """What is set for every process of the work: it imports what this one can, and uses one core."""
    return HEAP | ONE_THREAD | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def _lost(named: str, how: str) -> StageFailed:
    return StageFailed(
        f"{named}: {TRIES} processes in a row that worked on it were lost ({how}); take the damaged file among them"
        " out, or give the machine more memory (SAFELIGHT_PROCESSES=1 takes the least)"
    )


# local processes ----------------------------------------------------------------------------------------------------


def _in_processes(
    function: Callable[[Shard], Result],
    shards: Iterable[Shard],
    commit: Callable[[Shard, Result], None],
    crew: Crew,
    named: Callable[[Shard], str],
) -> None:
    workers = [
        _Worker({"CUDA_VISIBLE_DEVICES": crew.gpus[index % len(crew.gpus)]} if crew.gpus else {})
        for index in range(crew.processes)
    ]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def done_elsewhere(shard: Shard) -> Result:
        worker = idle.get()
        try:
            return worker.do(function, shard, named)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(crew.processes)
    pending: deque[tuple[Shard, Future[Result]]] = deque()

    def commit_first() -> None:
        shard, result = pending.popleft()
        commit(shard, result.result())

    try:
        for shard in shards:
            pending.append((shard, pool.submit(done_elsewhere, shard)))
            if len(pending) >= AHEAD * crew.processes:
                commit_first()
        while pending:
            commit_first()
    except Exception:
        raise  # what is at work goes on to its end, so that nothing half-written stays
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that does one shard after the other, started when the first comes, and anew where it was lost."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._starting = threading.Lock()

    def do(self, function: Callable[[Shard], Result], shard: Shard, named: Callable[[Shard], str]) -> Result:
        request = pickle.dumps((function, shard))
        for _ in range(TRIES):
            process = self._started()
            answer = _exchange(process, request)
            if answer is not None:
                result = pickle.loads(answer)
                if isinstance(result, SafelightError):
                    raise result
                return result
            log.warning("%s: its process ended with code %s; it is done again", named(shard), process.wait())
        raise _lost(named(shard), f"the last one with code {self._process.wait() if self._process else None}")

    def _started(self) -> "subprocess.Popen[bytes]":
        with self._starting:
            if self._ended:
                raise StageFailed("the work was given up")
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "components.shards"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | _environment() | self._environment,
                    start_new_session=True,  # Ctrl-C reaches the process that asked, and that one decides
                )
            return self._process

    def kill(self) -> None:
        """End the process, which has nothing to save, whatever it is doing; none is started any more."""
        with self._starting:
            self._ended = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """`kill`, when nothing waits for its answers any more."""
        self.kill()
        if self._process is not None:
            _close_pipes(self._process)


def _exchange(process: "subprocess.Popen[bytes]", request: bytes) -> bytes | None:
    """The answer to a request; None when the process ends before it has given one."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _send(process.stdin, request)
        answer = _receive(process.stdout)
    except OSError:
        answer = None
    if answer is None:
        process.wait()
        _close_pipes(process)
    return answer


def _close_pipes(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # what was not yet written to it
            if pipe is not None:
                pipe.close()


def _send(stream: IO[bytes], body: bytes) -> None:
    stream.write(LENGTH.pack(len(body)))
    stream.write(body)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    """The next body, or None at the end of the stream, even one in the middle of a body."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def main() -> None:
    """Answer requests until the process that sends them closes the pipe or is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        function, shard = pickle.loads(requests.get())
        _send(answers, pickle.dumps(_answer(function, shard)))


def _listen(requests: "queue.SimpleQueue[bytes]") -> None:
    while (request := _receive(sys.stdin.buffer)) is not None:
        requests.put(request)
    os._exit(0)  # also in the middle of a shard: nobody waits for it any more


# Ray ----------------------------------------------------------------------------------------------------------------


def _on_ray(
    function: Callable[[Shard], Result],
    shards: Iterable[Shard],
    commit: Callable[[Shard, Result], None],
    crew: Crew,
    named: Callable[[Shard], str],
) -> None:
    with joined_ray(crew) as ray:
        has = ray.cluster_resources()
        gpus = 1 if crew.gpus is not None and has.get("GPU") else 0
        task = ray.remote(_answer).options(num_cpus=1, num_gpus=gpus, max_retries=TRIES - 1)
        ahead = AHEAD * max(1, int(has.get("GPU" if gpus else "CPU", 1)))
        pending: deque[tuple[Shard, Any]] = deque()

        def commit_first() -> None:
            shard, reference = pending.popleft()
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                raise _lost(named(shard), type(error).__name__) from error
            if isinstance(result, SafelightError):
                raise result
            commit(shard, result)

        for shard in shards:
            pending.append((shard, task.remote(function, shard)))
            if len(pending) >= ahead:
                commit_first()
        while pending:
            commit_first()


@contextmanager
def joined_ray(crew: Crew) -> Iterator[Any]:
    """The `ray` module with a cluster behind it: the one that this process has joined already, or the crew's.

    A cluster that is started here ends with the block. Raises: BadInput where Ray is not installed.
    """
    ray = _ray()
    if ray.is_initialized():
        yield ray
        return
    handler = signal.getsignal(signal.SIGTERM)
    here = {"address": "local", "num_cpus": crew.processes, "include_dashboard": False}
    ray.init(
        **({"address": crew.ray_address} if crew.ray_address else here | {"object_store_memory": RAY_STORE}),
        runtime_env={"env_vars": HEAP | ONE_THREAD},
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process without a word
    try:
        yield ray
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise BadInput(
            "SAFELIGHT_ENGINE=ray: Ray is not installed; install safelight[ray], or leave the variable out"
        ) from None
    return ray


if __name__ == "__main__":
    main()
