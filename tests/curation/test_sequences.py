"""Whatever happens to a folder between two looks at it, the snapshot is that of a folder which was always so."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings

from components.curation import memory
from tests.soak.sequences import (
    Copy,
    Put,
    Rename,
    Rescan,
    Sequence,
    Tally,
    Wait,
    check,
    sequences,
)

EXAMPLES = 24
SHARED_MEMORY = Path("/dev/shm")
A, B = Put("a.png", "0", "a cat", quiet=False), Put("b.png", "1", "a dog", quiet=False)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder where an fsync costs nothing, if there is one."""
    with TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_any_sequence_of_changes_rescans_and_crashes_gives_the_snapshot_of_a_fresh_scan(
    in_memory: Path,
):
    """A few of the thousand that `make soak` does with real kills."""
    tally = Tally()

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(sequences())
    def drawn(sequence: Sequence) -> None:
        check(sequence, in_memory, tally=tally)

    drawn()
    assert tally.sequences >= EXAMPLES and tally.rescans > EXAMPLES and tally.kills > 3


@pytest.mark.parametrize("sides", ["all train", "drawn"])
def test_a_scan_that_crashes_at_every_single_write_ends_like_one_that_never_did(in_memory: Path, sides):
    tally = Tally()
    crashes = [(Put("a.png", str(at % 5), f"cat {at}", quiet=True), Rescan(at)) for at in range(1, 25)]
    changed = tuple(operation for crash in crashes for operation in crash)
    check(Sequence(sides, False, (A, B, Put("b.jpg", "6", "", quiet=False), *changed)), in_memory, tally=tally)
    assert 8 <= tally.kills < len(crashes)  # at each of its writes; the last crashes found none left to happen at


LATE_EDITS = {
    "edited in place": (A, B, Wait(), Rescan(None), Put("a.png", "2", "a cat", quiet=True)),
    "edited within the clock's grain": (A, B, Rescan(None), Put("a.png", "2", "a cat", quiet=True)),
    "swapped": (A, B, Wait(), Rescan(None), Rename("a.png", "b.png")),
    "replaced by a copy": (A, B, Wait(), Rescan(None), Copy("b.png", "a.png")),
}


@pytest.mark.parametrize("case", LATE_EDITS)
def test_a_change_that_leaves_size_and_time_of_writing_as_they_were_is_seen(tmp_path: Path, case: str):
    check(Sequence("all train", False, LATE_EDITS[case]), tmp_path)


def test_the_property_fails_where_an_edit_is_overlooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Were size and time of writing all that a scan looked at, it would be told from a fresh one."""

    def careless(row, now) -> bool:
        return (row.size, row.mtime_ns) == (now.st_size, now.st_mtime_ns)

    monkeypatch.setattr(memory, "_unchanged", careless)
    with pytest.raises(AssertionError):
        check(Sequence("all train", False, LATE_EDITS["edited in place"]), tmp_path)
