"""The torch child of a run: started when a stage first needs it, spoken to in JSON lines, never left behind."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from components import errors
from components.errors import SafelightError, StageFailed
from components.families.bases import WEIGHTS, BaseModel
from components.stages import Product
from components.storage import ObjectRef
from components.workspace import Workspace

ROOT = Path(__file__).parents[1]
SAVE_S = 60.0  # what a child gets to write its checkpoint after SIGTERM
TAIL_LINES = 3


SMALL_DENOISER = 200 * 10**6  # bytes of weights; below this, waking a second thread costs more than it brings: the
# embedded base (19 MB) takes 0.47 s a step on one thread and 0.78 s on two


def threads_for(base: BaseModel) -> int:
    """Threads of torch work: `SAFELIGHT_THREADS`, else one for a small base, else the cores this process may use."""
    if chosen := os.environ.get("SAFELIGHT_THREADS"):
        return int(chosen)
    weights = sum(file.stat().st_size for file in (base.path / base.architecture.denoiser_part).glob(WEIGHTS))
    return 1 if weights < SMALL_DENOISER else len(os.sched_getaffinity(0))


class TorchChild:
    """`ask` sends a request and relays the child's events until its result; one child serves a whole run."""

    def __init__(self, workspace: Workspace, log_path: Path, *, threads: int):
        self._workspace, self._log_path, self._threads = workspace, log_path, threads
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, request: dict[str, Any], on_event: Callable[[dict[str, Any]], None]) -> Product:
        """The product of a stage request. Raises the SafelightError that the child reports, or StageFailed."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request | {"home": str(self._workspace.home)}) + "\n")
            process.stdin.flush()
            return self._await(request["stage"], on_event)
        except BrokenPipeError:
            raise self._died(request["stage"]) from None
        except SafelightError:
            raise
        except BaseException:  # the flow was interrupted: let the child save its checkpoint
            self.close()
            raise

    def _await(self, stage: str, on_event: Callable[[dict[str, Any]], None]) -> Product:
        while (line := self._next_line()) is not None:
            event = json.loads(line)
            match event["event"]:
                case "result":
                    product = event["product"]
                    return Product(
                        {name: ObjectRef(**ref) for name, ref in product["outputs"].items()},
                        product["facts"],
                        product["items"],
                    )
                case "error":
                    raise getattr(errors, event["type"], StageFailed)(event["message"])
                case _:
                    on_event({"stage": stage} | event)
        raise self._died(stage)

    def _next_line(self) -> str | None:
        while True:  # a plain get() would not let a signal through
            try:
                return self._lines.get(timeout=0.5)
            except queue.Empty:
                continue

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            threads = str(self._threads)
            environment = os.environ | {
                "OMP_NUM_THREADS": threads,
                "OMP_WAIT_POLICY": "PASSIVE",
                "MKL_NUM_THREADS": threads,
                "TOKENIZERS_PARALLELISM": "false",
                "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
                "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF")
                or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),  # buckets do not fragment it
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            }
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            with self._log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "components.training.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            self._lines = queue.Queue()
            threading.Thread(target=_pump, args=(self._process, self._lines), daemon=True).start()
        return self._process

    def _died(self, stage: str) -> StageFailed:
        code = self._process.wait() if self._process else None
        tail = self._log_path.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:]
        return StageFailed(
            f"{stage}: the torch process ended with code {code}: {' | '.join(tail) or 'no output'}; "
            "run the same command to continue"
        )

    def close(self) -> None:
        """End the child and whatever it started: SIGTERM, time to save, SIGKILL."""
        process, self._process = self._process, None
        if process is None:
            return
        for signal_number, patience_s in ((signal.SIGTERM, SAVE_S), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, signal_number)
            except ProcessLookupError:
                break
            try:
                process.wait(timeout=patience_s)
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _pump(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)
