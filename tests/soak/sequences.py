"""What a folder goes through between retrainings, with kills in between: in the end nothing of it may show.

    python -m tests.soak.sequences --count 1000 --folder /tmp/sequences

A sequence of additions, edits in place, renames, swaps, copies, deletions, other captions, rescans and killed rescans
is done to a small folder under one workspace; then that workspace and one that never saw the folder before are asked
for its snapshot. What they must agree in is said by `check`. Hypothesis draws the sequences and shrinks one that
fails; a killed rescan is a process that ends by SIGKILL at its n-th fsync, rename or commit. The tally in `tally.jsonl`
is kept, and a campaign that was itself interrupted goes on where it was.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from sqlalchemy import Engine, event, insert, select

from components.catalog.models import Base, Snapshot, SnapshotItem
from components.config import CurationConfig, DataConfig, DataSource
from components.curation import memory
from components.curation.manifest import read_manifest
from components.curation.snapshots import curate, curate_key, sides_stand
from components.errors import BadInput
from components.stages import Bench, Product, ensure
from components.workspace import Workspace
from tests.curation.folders import picture

SIDE = 16
DATASET = "blobs"
TRUSTED_AGE_NS = 20_000_000  # a clock a hundred times finer than the real rule allows for, so that waiting is short
WAIT_S = 0.025
CHUNK = 50  # sequences between two lines of the tally
NAMES = ("a.png", "a.jpg", "A.png", "b.png", "naïve.png", "nai\u0308ve.png", "sub/b.png")
LIKE_0 = "0 enlarged"  # a near duplicate of "0"
CONTENTS = ("0", "1", "2", "3", "4", "5", "6", "damaged", LIKE_0)
CAPTIONS = ("a cat", "a dog", "", "caf\u00e9", "two\nlines")

Sides = Literal["stated", "all train", "drawn"]
Kill = Callable[[], None]
Interrupt = Callable[[Path, "Folder", int], bool]  # workspace, folder, event; whether it got that far


@dataclass(frozen=True)
class Put:
    """A picture is written under a name, over what was there: an addition, or an edit in place."""

    name: str
    content: str
    caption: str
    quiet: bool  # with the times put back that the file had


@dataclass(frozen=True)
class Recaption:
    name: str
    caption: str
    quiet: bool


@dataclass(frozen=True)
class Rename:
    """With its caption; where both names are taken they are swapped."""

    name: str
    to: str


@dataclass(frozen=True)
class Copy:
    """Over what was there, with the times of the original, as `cp -p` does."""

    name: str
    to: str


@dataclass(frozen=True)
class Delete:
    name: str


@dataclass(frozen=True)
class Wait:
    """Long enough for what was changed before to be trusted by later scans."""


@dataclass(frozen=True)
class Rescan:
    killed_at: int | None  # the fsync, rename or commit that it does not survive


Operation = Put | Recaption | Rename | Copy | Delete | Wait | Rescan


@dataclass(frozen=True)
class Sequence:
    sides: Sides  # who says on which side of the split a picture is
    in_table: bool  # captions in metadata.jsonl, or in files beside the pictures
    operations: tuple[Operation, ...]


def sequences() -> st.SearchStrategy[Sequence]:
    """One to six times a few changes and a rescan, then more changes.

    Where lots decide the sides there are no near duplicates, see `check`.
    """

    def of(sides: Sides) -> st.SearchStrategy[Sequence]:
        changes = st.lists(_changes(sides), min_size=1, max_size=5)
        rescans = st.builds(Rescan, st.none() | st.integers(1, 15))
        rounds = st.lists(st.tuples(changes, rescans), min_size=1, max_size=6)
        done = st.builds(_in_order, rounds, changes)
        in_table = st.just(True) if sides == "stated" else st.booleans()
        return st.builds(Sequence, st.just(sides), in_table, done)

    return st.sampled_from(("stated", "all train", "drawn")).flatmap(of)


def _changes(sides: Sides) -> st.SearchStrategy[Operation]:
    names, captions, quiet = st.sampled_from(NAMES), st.sampled_from(CAPTIONS), st.booleans()
    contents = st.sampled_from([content for content in CONTENTS if sides != "drawn" or content != LIKE_0])
    put = st.builds(Put, names, contents, captions, quiet)
    return st.one_of(
        put,
        put,
        st.builds(Recaption, names, captions, quiet),
        st.builds(Rename, names, names),
        st.builds(Copy, names, names),
        st.builds(Delete, names),
        st.just(Wait()),
    )


def _in_order(rounds: list[tuple[list[Operation], Rescan]], last: list[Operation]) -> tuple[Operation, ...]:
    return (*(operation for changes, rescan in rounds for operation in (*changes, rescan)), *last)


# the folder ---------------------------------------------------------------------------------------------------------


@cache
def content(name: str) -> bytes:
    """Uncompressed, so that every picture of one size has the same number of bytes, and so has the damaged one."""
    if name == "damaged":
        whole = content("0")
        return whole[:200] + bytes(value ^ 0xFF for value in whole[200:210]) + whole[210:]
    buffer = BytesIO()
    seed, side = (0, 2 * SIDE) if name == LIKE_0 else (int(name), SIDE)
    picture(seed, side).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def side_of(name: str) -> str:
    """What a table says of a picture: copies and what looks like it are on its side."""
    return "test" if name in ("0", LIKE_0, "3") else "train"


@dataclass
class Folder:
    """A folder of pictures, and what they are and are called there."""

    root: Path
    sides: Sides
    in_table: bool
    pictures: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> content and caption

    def do(self, operation: Operation) -> None:
        """What needs a picture that is not there is left out."""
        match operation:
            case Put(name, what, caption, quiet):
                self._write(self.root / name, content(what), quiet)
                self._say(name, what, caption, quiet)
            case Recaption(name, caption, quiet) if name in self.pictures:
                self._say(name, self.pictures[name][0], caption, quiet)
            case Rename(name, to) if name in self.pictures and name != to:
                self._rename(name, to)
            case Copy(name, to) if name in self.pictures and name != to:
                self._write(self.root / to, b"", quiet=False)
                shutil.copy2(self.root / name, self.root / to)
                self._say(to, *self.pictures[name], quiet=True)
            case Delete(name) if name in self.pictures:
                (self.root / name).unlink()
                del self.pictures[name]
                self._say_no_more(name)
            case Wait():
                time.sleep(WAIT_S)

    def _rename(self, name: str, to: str) -> None:
        if to in self.pictures:
            aside = self.root / "aside"
            (self.root / to).rename(aside)
            (self.root / name).rename(self.root / to)
            aside.rename(self.root / name)
            self.pictures[name], self.pictures[to] = self.pictures[to], self.pictures[name]
            self._say(name, *self.pictures[name], quiet=True)
        else:
            (self.root / to).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).rename(self.root / to)
            self.pictures[to] = self.pictures.pop(name)
            self._say_no_more(name)
        self._say(to, *self.pictures[to], quiet=True)

    def _say(self, name: str, what: str, caption: str, quiet: bool) -> None:
        self.pictures[name] = (what, caption)
        if self.in_table:
            self._write_table(quiet)
        else:
            self._write((self.root / name).with_suffix(".txt"), caption.encode(), quiet)

    def _say_no_more(self, name: str) -> None:
        """The caption file stays while another picture has it for its own."""
        beside = (self.root / name).with_suffix(".txt")
        stems = [(self.root / other).with_suffix("") for other in self.pictures]
        if self.in_table:
            self._write_table(quiet=False)
        elif beside.with_suffix("") not in stems:
            beside.unlink()

    def _write_table(self, quiet: bool) -> None:
        rows = [
            {"file_name": name, "text": caption} | ({"split": side_of(what)} if self.sides == "stated" else {})
            for name, (what, caption) in sorted(self.pictures.items())
        ]
        self._write(self.root / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode(), quiet)

    def _write(self, path: Path, data: bytes, quiet: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat() if path.exists() else None
        path.write_bytes(data)
        if quiet and before is not None:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# the workspaces -----------------------------------------------------------------------------------------------------


@cache
def empty_home(where: Path) -> Path:
    """A workspace with empty tables, to be copied."""
    bench = Bench.open(Workspace(where / "empty"))
    Base.metadata.create_all(bench.catalog.engine)
    bench.catalog.engine.dispose()
    return where / "empty"


@contextmanager
def opened(home: Path) -> Iterator[Bench]:
    """A workspace as a process of its own would open it."""
    bench = Bench.open(Workspace(home))
    try:
        yield bench
    finally:
        bench.catalog.engine.dispose()


def snapshot_of(bench: Bench, folder: Folder) -> Product | str:
    """What the curation stage gives, or why it refuses."""
    data = DataConfig(sources=(DataSource(path=str(folder.root)),))
    curation = CurationConfig(test_fraction=0.0 if folder.sides == "all train" else 0.1)
    settings = {"dataset": DATASET, "training_size": SIDE}
    try:
        key, scanned = curate_key(bench, data, curation, **settings)
        made = ensure(bench, "curate", key, lambda: curate(bench, data, curation, scanned=scanned, key=key, **settings),
                      still_there=lambda product: sides_stand(bench, curation, DATASET, product))  # fmt: skip
        return made.product
    except BadInput as error:
        return str(error)


class Ended(BaseException):
    """In the place of SIGKILL where there is but one process."""


def end_here() -> None:
    raise Ended


@contextmanager
def ending(at: int, kill: Kill) -> Iterator[None]:
    """Nothing from the `at`-th fsync, rename or commit on comes to pass."""
    events = count(1)

    def before(*_: object) -> None:
        if next(events) >= at:
            kill()

    fsync, replace = os.fsync, Path.replace
    event.listen(Engine, "commit", before)
    try:
        with (
            mock.patch.object(os, "fsync", lambda file: (before(), fsync(file))[1]),
            mock.patch.object(Path, "replace", lambda path, target: (before(), replace(path, target))[1]),
        ):
            yield
    finally:
        event.remove(Engine, "commit", before)


def rescan_ended(home: Path, folder: Folder, at: int) -> bool:
    """A rescan that raises where it would have been killed; whether it got that far."""
    try:
        with opened(home) as bench, ending(at, end_here):
            snapshot_of(bench, folder)
    except Ended:
        return True
    return False


def rescan_killed(home: Path, folder: Folder, at: int) -> bool:
    """A rescan by another process, which SIGKILL ends; whether it got that far."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    signal.alarm(60)
    try:
        with opened(home) as bench, ending(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            snapshot_of(bench, folder)
        os._exit(0)
    finally:
        os._exit(1)


# the property -------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    sequences: int = 0
    operations: int = 0
    rescans: int = 0
    kills: int = 0


def check(sequence: Sequence, where: Path, *, interrupt: Interrupt = rescan_ended, tally: Tally | None = None) -> None:
    """Do the sequence in the empty folder `where / "run"`, and hold its workspace against one that is new.

    1. Both accept the folder, or both refuse it with the same words.
    2. Where the data states the sides, or all is for training, manifest and verdicts have the same bytes.
    3. Where lots decide, they have the same samples and verdicts. A picture's side is the first that a snapshot of the
       data set gave it: so that nothing that was trained on is tested on, and new pictures move no old one. Hence a
       new workspace that is told only of those earlier snapshots gives the same bytes.

    3 is for folders without near duplicates: a chain of them that appears later joins two old sides, then train wins.
    """
    tally = tally or Tally()
    run = where / "run"
    shutil.rmtree(run, ignore_errors=True)
    _copied(empty_home(where), run / "old")
    folder = Folder(run / "data", sequence.sides, sequence.in_table)
    folder.root.mkdir()
    with mock.patch.object(memory, "TRUSTED_AGE_NS", TRUSTED_AGE_NS):
        for operation in sequence.operations:
            if isinstance(operation, Rescan):
                _rescan(run / "old", folder, operation, interrupt, tally)
            else:
                folder.do(operation)
        before, history = _state(folder.root), _snapshots(run / "old")
        old, old_rows = _asked(run / "old", folder)
        new, new_rows = _asked(_copied(empty_home(where), run / "new"), folder)
        told = new
        if sequence.sides == "drawn":
            told, _ = _asked(_told(_copied(empty_home(where), run / "told"), history), folder)
    assert _state(folder.root) == before, "the sources were changed"
    if isinstance(old, str) or isinstance(new, str):
        assert old == new
    else:
        assert isinstance(told, Product)
        assert old.outputs == told.outputs, "history shows"
        assert [row | {"split": None} for row in old_rows] == [row | {"split": None} for row in new_rows]
        assert old.outputs["verdicts"] == new.outputs["verdicts"]
        if sequence.sides == "drawn":
            _require_first_sides(
                [
                    *([item["rgb_digest"], item["split"]] for item in history["items"] if item["kept"]),
                    *([row["rgb_digest"], row["split"]] for row in old_rows),
                ]
            )
    tally.sequences += 1
    tally.operations += len(sequence.operations)


def _rescan(home: Path, folder: Folder, rescan: Rescan, interrupt: Interrupt, tally: Tally) -> None:
    tally.rescans += 1
    if rescan.killed_at is not None:
        tally.kills += interrupt(home, folder, rescan.killed_at)
        return
    with opened(home) as bench:
        snapshot_of(bench, folder)


def _asked(home: Path, folder: Folder) -> tuple[Product | str, list[dict[str, Any]]]:
    """A workspace's answer, and its samples by name."""
    with opened(home) as bench:
        found = snapshot_of(bench, folder)
        rows = [] if isinstance(found, str) else read_manifest(bench.store, found.outputs["manifest"].sha256)
    return found, sorted((asdict(row) for row in rows), key=lambda row: row["file_name"])


def _require_first_sides(sides: list[list[str]]) -> None:
    """`sides`: pictures' digests and sides, the earliest first."""
    first: dict[str, str] = {}
    for picture_digest, side in sides:
        assert first.setdefault(picture_digest, side) == side, "a picture moved to the other side"


def _snapshots(home: Path) -> dict[str, list[dict[str, Any]]]:
    """What a workspace knows of its snapshots, the earliest first."""
    with opened(home) as bench, bench.catalog.read() as session:
        snapshots = session.execute(select(Snapshot.__table__).order_by(Snapshot.version)).mappings()
        items = session.execute(
            select(SnapshotItem.__table__).join(Snapshot).order_by(Snapshot.version, SnapshotItem.ordinal)
        ).mappings()
        return {"snapshots": [dict(row) for row in snapshots], "items": [dict(row) for row in items]}


def _told(home: Path, history: dict[str, list[dict[str, Any]]]) -> Path:
    """The workspace, with another one's snapshots in its catalog."""
    with opened(home) as bench, bench.catalog.write() as session:
        for table, rows in ((Snapshot, history["snapshots"]), (SnapshotItem, history["items"])):
            if rows:
                session.execute(insert(table), rows)
    return home


def _copied(home: Path, to: Path) -> Path:
    shutil.copytree(home, to)
    return to


def _state(folder: Path) -> list[tuple[str, bytes, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.read_bytes(), path.stat().st_mtime_ns) for path in files]


# the campaign -------------------------------------------------------------------------------------------------------


def campaign_chunk(number: int, where: Path) -> dict[str, Any]:
    """CHUNK sequences drawn from this seed; the failure is that of the shortest that fails."""
    tally, failure, started = Tally(), None, time.monotonic()

    @seeded(number)
    @settings(max_examples=CHUNK, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(sequences())
    def drawn(sequence: Sequence) -> None:
        check(sequence, where, interrupt=rescan_killed, tally=tally)

    try:
        drawn()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        failure = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return {"seed": number} | asdict(tally) | {"failure": failure, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=1000, help=f"sequences, rounded up to {CHUNK}")
    options.add_argument("--folder", type=Path, required=True, help="keeps the tally")
    options.add_argument("--scratch", type=Path, help="where the workspaces are; default: the folder")
    arguments = options.parse_args()
    folder: Path = arguments.folder.resolve()
    scratch: Path = (arguments.scratch or folder).resolve()
    for place in (folder, scratch):
        place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch / "empty", ignore_errors=True)
    tally_path = folder / "tally.jsonl"
    tally = [json.loads(line) for line in tally_path.read_text().splitlines()] if tally_path.exists() else []
    while sum(line["sequences"] for line in tally) < arguments.count:
        tally.append(campaign_chunk(len(tally), scratch))
        with tally_path.open("a") as file:
            file.write(json.dumps(tally[-1]) + "\n")
        print(json.dumps(tally[-1]), flush=True)
        if not tally[-1]["sequences"]:
            break  # not one succeeds
    bad = [line["seed"] for line in tally if line["failure"]]
    done = {name: sum(line[name] for line in tally) for name in ("sequences", "operations", "rescans", "kills")}
    print(", ".join(f"{number} {name}" for name, number in done.items()), f"; seeds that failed: {bad or 'none'}")
    sys.stdout.flush()
    os._exit(1 if bad else 0)  # threads of pyarrow, which forks have cut off, would abort an orderly end


if __name__ == "__main__":
    main()
