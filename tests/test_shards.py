"""The seam: the same results in the same order from every engine, and a lost process that costs its shard alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from components.config import CurationConfig
from components.curation import examining
from components.curation.examining import OnProgress
from components.curation.manifest import read_manifest
from components.curation.snapshots import curate
from components.errors import BadInput, SafelightError, StageFailed
from components.shards import AHEAD, Crew, Engine, run_shards
from components.stages import Bench, Product
from components.workspace import Workspace
from tests.curation.folders import mixed_folder, new_bench, sources

ROOT = Path(__file__).parents[1]
TWO = Crew(processes=2)


@pytest.fixture(params=["local", "ray"])
def crew(request: pytest.FixtureRequest) -> Crew:
    return TWO if request.param == "local" else request.getfixturevalue("two_on_ray")


def square(shard: tuple[int, Path]) -> tuple[int, int]:
    """The shard's number squared and the process; leaves a mark for each time that it was called."""
    number, marks = shard
    time.sleep(0.05 if number == 0 else 0)  # the first one is the last to be ready
    with (marks / str(number)).open("a") as mark:
        mark.write("x")
    return number * number, os.getpid()


def die_once(shard: tuple[int, Path]) -> int:
    """Kills the process that is given shard 3 for the first time."""
    number, marks = shard
    with (marks / str(number)).open("a") as mark:
        mark.write("x")
    if number == 3 and (marks / "3").read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(shard: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(shard: int) -> int:
    if shard == 2:
        raise BadInput("picture two cannot be used")
    return 1 // (5 - shard)


def sleep_long(shard: Path) -> None:
    shard.write_text(str(os.getpid()))
    time.sleep(600)


def test_results_come_in_the_order_of_the_shards_and_from_other_processes(crew: Crew, tmp_path: Path):
    got = []
    shards = [(number, tmp_path) for number in range(12)]
    run_shards(square, shards, lambda shard, result: got.append((shard[0], *result)), crew, named=str)
    assert [(number, result) for number, result, _ in got] == [(number, number * number) for number in range(12)]
    processes = {process for _, _, process in got}
    assert os.getpid() not in processes and 1 <= len(processes) <= 2
    assert {(tmp_path / str(number)).read_text() for number in range(12)} == {"x"}


def test_a_lost_process_costs_the_shard_it_had_and_no_other(crew: Crew, tmp_path: Path):
    got = []
    run_shards(die_once, [(number, tmp_path) for number in range(8)], lambda _, result: got.append(result), crew,
               named=str)
    assert got == list(range(8))
    assert {number: len((tmp_path / str(number)).read_text()) for number in range(8)} == {
        number: 2 if number == 3 else 1 for number in range(8)}


def test_a_shard_that_loses_every_process_is_given_up_by_name(crew: Crew):
    with pytest.raises(StageFailed, match=r"a\.png to b\.png: 3 processes .* were lost .*SAFELIGHT_PROCESSES=1"):
        run_shards(die, [1], lambda _, result: None, crew, named=lambda shard: "a.png to b.png")


def test_an_error_is_raised_here_and_what_came_before_is_committed(crew: Crew):
    got: list[int] = []
    with pytest.raises(BadInput, match="picture two cannot be used"):
        run_shards(refuse, range(4), lambda shard, _: got.append(shard), crew, named=str)
    assert got == [0, 1]
    with pytest.raises(StageFailed, match="refuse: ZeroDivisionError: integer division or modulo by zero"):
        run_shards(refuse, [4, 5], lambda shard, _: got.append(shard), crew, named=str)
    assert got == [0, 1, 4]


def test_of_a_long_list_only_a_few_shards_are_asked_for_ahead(tmp_path: Path):
    asked, committed, ahead = 0, 0, []

    def shards():
        nonlocal asked
        for number in range(60):
            asked += 1
            yield number, tmp_path

    def commit(shard: tuple[int, Path], result: tuple[int, int]) -> None:
        nonlocal committed
        committed += 1
        ahead.append(asked - committed)

    run_shards(square, shards(), commit, TWO, named=str)
    assert committed == 60 and max(ahead) == AHEAD * TWO.processes - 1


def test_a_commit_that_fails_ends_the_work_and_its_processes(tmp_path: Path):
    seen: set[int] = set()

    def commit(shard: tuple[int, Path], result: tuple[int, int]) -> None:
        seen.add(result[1])
        raise SafelightError("the disk is full")

    with pytest.raises(SafelightError, match="the disk is full"):
        run_shards(square, [(number, tmp_path) for number in range(100)], commit, TWO, named=str)
    assert len(seen) == 1 and not Path(f"/proc/{seen.pop()}").exists()


PARENT = """
import sys
from pathlib import Path
from components.shards import Crew, run_shards
from tests.test_shards import sleep_long
run_shards(sleep_long, [Path(sys.argv[1])], lambda shard, result: None, Crew(), named=str)
"""


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path):
    mark = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(mark)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = Path(f"/proc/{mark.read_text()}")
    assert child.exists()
    parent.kill()
    parent.wait()
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or (child / "stat").read_text().split()[2] == "Z"


def test_ray_is_imported_only_where_it_is_asked_for():
    code = "import sys, components.shards, components.curation.snapshots; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# curation behind the seam -------------------------------------------------------------------------------------------


@pytest.fixture
def always_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is to do, it is done in shards of five pictures, in other processes."""
    monkeypatch.setattr(examining, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(examining, "SHARD_ITEMS", 5)


def curated_by(crew: Crew, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch,
               on_progress: OnProgress = lambda done, total: None) -> tuple[Bench, Product]:
    monkeypatch.setenv("SAFELIGHT_ENGINE", crew.engine)
    monkeypatch.setenv("SAFELIGHT_PROCESSES", str(crew.processes))
    bench = new_bench(home)
    return bench, curate(bench, sources(folder), CurationConfig(), dataset="blobs", training_size=64,
                         on_progress=on_progress)


@pytest.mark.usefixtures("always_elsewhere")
@pytest.mark.parametrize(("engine", "processes"), [("local", 1), ("local", 3), ("ray", 2)])
def test_a_snapshot_is_the_same_from_every_engine_and_number_of_processes(
    engine: Engine, processes: int, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if engine == "ray":
        request.getfixturevalue("two_on_ray")
    crew = Crew(engine, processes)
    folder = mixed_folder(tmp_path / "data")
    with monkeypatch.context() as here:
        here.setattr(examining, "WORTH_PROCESSES", 1 << 40)
        _, alone = curated_by(crew, tmp_path / "alone", folder, here)
    progress: list[int] = []
    bench, made = curated_by(crew, tmp_path / "home", folder, monkeypatch,
                             lambda done, total: progress.append(done))
    assert made.outputs == alone.outputs and made.facts == alone.facts
    assert made.facts["examined"] == 30 and progress == [0, 5, 10, 15, 20, 25, 30]
    kept = read_manifest(bench.store, made.facts["digest"])
    assert {row.file_name for row in kept} == {path.name for path in folder.glob("*.png")} - {"007.png", "copy.png"}
    assert all(bench.store.read(row.sha256) == (folder / row.file_name).read_bytes() for row in kept)


@pytest.mark.usefixtures("always_elsewhere")
def test_curating_goes_on_when_one_of_its_processes_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, killed = mixed_folder(tmp_path / "data"), []

    def kill_one(done: int, total: int) -> None:
        if done and not killed:
            workers = [child for child in psutil.Process().children() if "components.shards" in child.cmdline()]
            workers[0].kill()
            killed.append(workers[0].pid)

    _, unbroken = curated_by(TWO, tmp_path / "unbroken", folder, monkeypatch)
    _, made = curated_by(TWO, tmp_path / "home", folder, monkeypatch, kill_one)
    assert killed and made.outputs == unbroken.outputs and made.facts["examined"] == 30


# who works ----------------------------------------------------------------------------------------------------------


def test_each_process_that_encodes_has_a_gpu_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which one is said by the variable that CUDA reads: no GPU is needed to see it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    crew = Workspace(tmp_path).encoding_crew(gpus=2)
    assert crew == Crew("local", 2, gpus=("4", "6"))
    seen: dict[int, set[str]] = {}
    run_shards(visible_gpu, range(8), lambda _, found: seen.setdefault(found[0], set()).add(found[1]), crew, named=str)
    assert sorted(seen.values(), key=str) == [{"4"}, {"6"}]
    monkeypatch.setenv("SAFELIGHT_ENCODERS", "1")
    assert Workspace(tmp_path).encoding_crew(gpus=2).processes == 1


def visible_gpu(shard: int) -> tuple[int, str]:
    time.sleep(0.2)  # so that no process does everything
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def test_the_crew_is_the_machines_and_a_setting_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch):
    workspace = Workspace(Path("home"))
    assert workspace.crew == Crew("local", len(os.sched_getaffinity(0)), None)
    assert workspace.encoding_crew(gpus=0) == Crew("local", 1, gpus=())
    for name, value in {"SAFELIGHT_PROCESSES": "0", "SAFELIGHT_ENCODERS": "x", "SAFELIGHT_ENGINE": "dask"}.items():
        with monkeypatch.context() as wrong, pytest.raises(BadInput, match=f"{name} is '{value}': expected"):
            wrong.setenv(name, value)
            _ = workspace.encoding_crew(gpus=0)
            _ = workspace.crew
