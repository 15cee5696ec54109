"""Stage keys and the one cache."""

import os
import threading
import time
from pathlib import Path

import pytest

from components.curation import memory
from components.stages import Bench, Product, canonical_json, committed, ensure, stage_key
from components.storage import sha256_of
from components.workspace import Workspace

KEY = "k" * 32


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench.open(Workspace(tmp_path))
    bench.catalog.migrate()
    return bench


def product(bench: Bench, data: bytes = b"result") -> Product:
    return Product({"file": bench.store.put(data)}, {"n": 1}, items=1)


def test_equal_values_have_equal_json_whatever_the_order_of_their_keys():
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'.encode()


def test_any_difference_in_stage_inputs_or_configuration_is_another_key():
    keys = {
        stage_key(stage, inputs={"x": x}, config={"c": c})
        for stage in ("curate", "cache")
        for x in "ab"
        for c in (1, 2)
    }
    assert len(keys) == 8
    assert all(len(key) == 32 for key in keys)


def test_a_result_is_produced_once_and_then_reused(bench: Bench):
    calls = []
    outcomes = [ensure(bench, "curate", KEY, lambda: calls.append(1) or product(bench)).outcome for _ in range(3)]
    assert outcomes == ["produced", "reused", "reused"]
    assert len(calls) == 1


@pytest.mark.parametrize("harm", ["delete", "alter"])
def test_a_result_whose_bytes_are_gone_or_wrong_is_repaired(bench: Bench, harm: str):
    first = ensure(bench, "curate", KEY, lambda: product(bench))
    path = bench.store.path(first.product.outputs["file"].sha256)
    path.unlink() if harm == "delete" else path.write_bytes(b"resulT")
    assert committed(bench, KEY) is None
    again = ensure(bench, "curate", KEY, lambda: product(bench))
    assert (again.outcome, again.product) == ("repaired", first.product)
    assert bench.store.read(again.product.outputs["file"].sha256) == b"result"


def test_a_failing_stage_commits_nothing(bench: Bench):
    def fail() -> Product:
        bench.store.put(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ensure(bench, "curate", KEY, fail)
    assert committed(bench, KEY) is None
    assert ensure(bench, "curate", KEY, lambda: product(bench)).outcome == "produced"


def test_two_callers_racing_on_one_key_work_once(bench: Bench):
    calls, outcomes, gate = [], [], threading.Barrier(2)

    def run() -> None:
        gate.wait()
        outcomes.append(ensure(bench, "curate", KEY, lambda: calls.append(1) or product(bench)).outcome)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(outcomes) == ["produced", "reused"]


def test_what_a_stage_keeps_elsewhere_counts_too(bench: Bench):
    ensure(bench, "register", KEY, lambda: product(bench))
    assert ensure(bench, "register", KEY, lambda: product(bench), still_there=lambda _: False).outcome == "repaired"


def test_what_was_hashed_is_not_hashed_again_until_it_changes_or_somebody_asks(bench: Bench, hashed: list[Path]):
    data = bench.store.path(ensure(bench, "curate", KEY, lambda: product(bench)).product.outputs["file"].sha256)
    long_ago(data)
    for _ in range(3):
        assert ensure(bench, "curate", KEY, lambda: product(bench)).outcome == "reused"
    assert hashed == [data]
    assert ensure(bench, "curate", KEY, lambda: product(bench), verify=True).outcome == "reused"
    assert hashed == [data, data]
    os.utime(data)
    assert committed(bench, KEY) is not None
    assert hashed == [data, data, data]


def test_a_change_that_keeps_size_and_times_is_found(bench: Bench, hashed: list[Path]):
    data = bench.store.path(ensure(bench, "curate", KEY, lambda: product(bench)).product.outputs["file"].sha256)
    long_ago(data)
    assert committed(bench, KEY) is not None and committed(bench, KEY) is not None
    before = data.stat()
    data.write_bytes(b"resulT")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert committed(bench, KEY) is None
    assert ensure(bench, "curate", KEY, lambda: product(bench)).outcome == "repaired"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed, in turn."""
    seen = []
    monkeypatch.setattr(memory, "sha256_of", lambda path: seen.append(path) or sha256_of(path))
    monkeypatch.setattr(memory, "TRUSTED_AGE_NS", 0)  # the times of a fresh file are trusted after a moment
    return seen


def long_ago(path: Path) -> None:
    """Wait until the clock of files has gone on since the file was written."""
    deadline = time.monotonic() + 5
    while time.time_ns() <= path.stat().st_ctime_ns + 20_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
