"""Work prepared ahead of who takes it: pictures are decoded and resized while the encoder works on those before."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = min(4, os.cpu_count() or 1)
DEPTH = 4  # prepared or being prepared beyond what is taken

Task = TypeVar("Task")
Result = TypeVar("Result")


def ahead(
    tasks: Iterable[Task], prepare: Callable[[Task], Result], *, threads: int = THREADS, depth: int = DEPTH
) -> Generator[tuple[Task, Result], None, None]:
    """Each task in order with what `prepare` makes of it, `depth` more in the making. Errors come in their turn."""
    queue: deque[tuple[Task, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    try:
        for task in tasks:
            queue.append((task, pool.submit(prepare, task)))
            if len(queue) > depth:
                first, future = queue.popleft()
                yield first, future.result()
        while queue:
            first, future = queue.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
