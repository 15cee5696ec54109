"""What it costs to look at data again, counted: a hundredth of the files changed is a hundredth of the work."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from components.config import DataConfig, DataSource
from components.curation import memory
from components.curation.scanning import scan
from components.stages import Bench, Product
from tests.curation.folders import curated, picture, pictures
from tests.curation.listening import listening

NUMBER = 100


def curated_with_opens(bench: Bench, folder: Path) -> tuple[Product, Counter[str]]:
    """What curating gives, and how often each of the folder's files was opened for it."""
    with listening() as heard:
        product = curated(bench, folder)
    return product, Counter(Path(name).name for name in heard if name.startswith(str(folder)))


def test_a_hundredth_of_the_pictures_changed_costs_a_hundredth_of_the_work(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "TRUSTED_AGE_NS", -(10**12))  # the files are younger than would be trusted
    folder = pictures(tmp_path / "data", NUMBER)
    first, opened = curated_with_opens(bench, folder)
    assert (first.facts["hashed"], first.facts["examined"]) == (NUMBER, NUMBER)
    assert opened == {path.name: 2 if path.suffix == ".png" else 1 for path in folder.iterdir()}  # hashed, then decoded

    unchanged, opened = curated_with_opens(bench, folder)
    assert (unchanged.facts["hashed"], unchanged.facts["examined"], opened) == (0, 0, {})
    assert unchanged.outputs == first.outputs

    picture(1000).save(folder / "007.png")
    (folder / "050.txt").write_text("another caption\n")
    changed, opened = curated_with_opens(bench, folder)
    assert (changed.facts["hashed"], changed.facts["examined"]) == (1, 1)
    assert opened == {"007.png": 2, "050.txt": 1}


def headers(folder: Path, number: int) -> DataConfig:
    """A folder of files that only their names make pictures, with two captions."""
    folder.mkdir()
    for name in range(number):
        (folder / f"{name:05}.png").write_bytes(name.to_bytes(4))
    for name in range(2):
        (folder / f"{name:05}.txt").write_text("a thing")
    return DataConfig(sources=(DataSource(path=str(folder), class_tokens="a thing"),))


def test_a_scan_tells_how_far_it_is(bench: Bench, tmp_path: Path):
    told: list[tuple[str, int, int | None]] = []
    data = headers(tmp_path / "data", 1100)
    scan(bench, data, on_progress=lambda *step: told.append(step))
    assert told == [
        ("listing", 1000, None), ("listing", 1102, None), ("captions", 2, None),
        ("scanning", 0, 1100), ("scanning", 500, 1100), ("scanning", 1000, 1100), ("scanning", 1100, 1100),
    ]  # fmt: skip


def test_a_first_scan_that_is_killed_goes_on_where_it_was(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = headers(tmp_path / "data", 1300)
    code = (
        "import os, signal, sys\n"
        "from components.config import DataConfig\n"
        "from components.curation.scanning import scan\n"
        "from components.stages import Bench\n"
        "from components.workspace import Workspace\n"
        "def kill(step, done, total):\n"
        "    if step == 'scanning' and done == 1000:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "bench, data = Bench.open(Workspace.from_environment()), DataConfig.model_validate_json(sys.argv[1])\n"
        "scan(bench, data, on_progress=kill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, data.model_dump_json()], check=False,
                            env=os.environ | {"SAFELIGHT_HOME": str(bench.workspace.home)})  # fmt: skip
    assert killed.returncode == -9
    monkeypatch.setattr(memory, "TRUSTED_AGE_NS", -(10**12))  # the files are younger than would be trusted
    assert scan(bench, data).hashed == 300
    assert scan(bench, data).hashed == 0
