"""Work ahead of who takes it: in order, only so far, and an error where its turn is."""

import threading
import time

import pytest

from components.latents.ahead import ahead


def test_results_come_in_order_whichever_is_ready_first():
    delays = [0.05, 0.0, 0.03, 0.0, 0.01]

    def prepare(task: int) -> int:
        time.sleep(delays[task])
        return task * task

    assert list(ahead(range(5), prepare, threads=5, depth=5)) == [(task, task * task) for task in range(5)]


def test_no_more_is_taken_up_than_is_asked_for_and_some_ahead():
    taken = []

    def tasks():
        for task in range(100):
            taken.append(task)
            yield task

    results = ahead(tasks(), lambda task: task, threads=2, depth=3)
    assert next(results) == (0, 0) and len(taken) == 4
    assert next(results) == (1, 1) and len(taken) == 5
    results.close()
    assert len(taken) == 5


def test_an_error_comes_after_what_stands_before_it_and_ends_the_threads():
    def prepare(task: int) -> float:
        return 1 / (3 - task)

    seen = []
    with pytest.raises(ZeroDivisionError):
        for task, _ in ahead(range(10), prepare, threads=3, depth=4):
            seen.append(task)
    assert seen == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
