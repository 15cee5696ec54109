"""The journal of a run survives whatever ends the run."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from components.errors import StorageFull
from flows.journal import Journal, read_entries


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def values(path: Path) -> list[object]:
    return [entry.body["x"] for entry in read_entries(path)]


def test_what_was_appended_comes_back_in_order_with_its_time(path: Path):
    journal = Journal(path)
    journal.append("note", {"x": "née 🙂 \x00 \ud800"}, t_ms=5)
    journal.append("note", {"x": math.inf})
    journal.close()
    first, second = read_entries(path)
    assert (first.seq, first.t_ms, first.kind) == (0, 5, "note")
    assert first.body["x"] == "née 🙂 \x00 \ud800"
    assert second.body["x"] == math.inf
    assert second.t_ms > 1.7e12
    assert second.end == path.stat().st_size


def test_reading_goes_on_from_the_end_of_any_entry(path: Path):
    journal = Journal(path)
    ends = [journal.append("note", {"x": x}).end for x in range(5)]
    assert [entry.body["x"] for entry in read_entries(path, ends[2])] == [3, 4]
    assert list(read_entries(path, ends[4])) == []


def test_a_reopened_journal_counts_on(path: Path):
    for x in range(3):
        journal = Journal(path)
        journal.append("note", {"x": x})
        journal.close()
    assert [entry.seq for entry in read_entries(path)] == [0, 1, 2]


def test_a_last_line_cut_anywhere_is_ignored_and_written_over(path: Path):
    journal = Journal(path)
    kept = journal.append("note", {"x": "kept"})
    torn = journal.append("note", {"x": "torn é"})
    whole = path.read_bytes()
    for cut in range(kept.end, torn.end):
        path.write_bytes(whole[:cut])
        assert values(path) == ["kept"]
        again = Journal(path)
        entry = again.append("note", {"x": "new"})
        again.close()
        assert entry.seq == 1
        assert values(path) == ["kept", "new"]


def test_a_process_killed_while_it_appends_leaves_whole_lines_in_sequence(path: Path):
    program = f"""
from pathlib import Path
from flows.journal import Journal
journal = Journal(Path({str(path)!r}))
print("ready", flush=True)
while True:
    journal.append("note", {{"x": "y" * 3000}})
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root) as child:
        assert child.stdout
        child.stdout.readline()
        while not path.exists() or path.stat().st_size < 200_000:
            assert child.poll() is None
        os.kill(child.pid, signal.SIGKILL)
    count = len(list(read_entries(path)))
    journal = Journal(path)
    journal.append("note", {"x": "after"})
    entries = list(read_entries(path))
    assert [entry.seq for entry in entries] == list(range(count + 1))
    assert entries[-1].body["x"] == "after"


def test_threads_never_tear_each_others_lines(path: Path):
    journal = Journal(path)

    def work(name: int) -> None:
        for x in range(200):
            journal.append("note", {"x": [name, x, "padding" * name]})

    threads = [threading.Thread(target=work, args=[name]) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = list(read_entries(path))
    assert [entry.seq for entry in entries] == list(range(800))
    assert sorted(tuple(entry.body["x"][:2]) for entry in entries) == [(n, x) for n in range(4) for x in range(200)]


def test_a_full_disk_is_reported_and_the_journal_still_ends_with_a_whole_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    journal = Journal(path)
    journal.append("note", {"x": "kept"})
    write = os.pwrite
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:7], offset))
        with pytest.raises(StorageFull, match="no space left"):
            journal.append("note", {"x": "lost"})
    assert journal.append("note", {"x": "later"}).seq == 1
    assert values(path) == ["kept", "later"]


def test_each_line_is_one_json_document(path: Path):
    journal = Journal(path)
    journal.append("note", {"x": "two\nlines\r\u2028"})
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line)["body"] == {"x": "two\nlines\r\u2028"}
