"""Captioning a folder: every picture once, one bad picture costs no other its caption, and sources stay as they are."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sqlalchemy import func, select

from components.captioning import captioner as plugins
from components.captioning.captioner import CaptionContext, CaptionResult, Generation
from components.captioning.captioning import Extent, Report, caption_pictures
from components.captioning.weights import Weights
from components.catalog.captions import of_captioners
from components.catalog.models import StoredCaption
from components.config import CaptionsConfig
from components.errors import BadInput, OutOfMemory, Stopped
from components.stages import Bench
from components.storage import sha256_of
from tests.curation.folders import picture, pictures, sources, tree_digest

ROOT = Path(__file__).parents[2]


class Meter:
    """A captioner that says the mean colour of a picture: what it says depends on the picture alone."""

    name, revision, kind, max_batch, needs_gpu, default_prompt, settings = "meter", "r1", "prose", 64, False, "", ""
    room = 64  # pictures that fit
    bad = ""  # the file that it cannot say anything about
    asked: list[list[str]] = []  # noqa: RUF012

    def __init__(self, weights: Weights, generation: Generation):
        self.loaded = False

    def load(self, device: str, dtype: torch.dtype, offline: bool) -> None:
        self.loaded = True

    def caption(self, images: Sequence[Image.Image], contexts: Sequence[CaptionContext]) -> list[CaptionResult]:
        assert self.loaded
        self.asked.append([context.file_name for context in contexts])
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(context.file_name == self.bad for context in contexts):
            raise ZeroDivisionError("no such colour")
        return [
            CaptionResult(f"{context.prompt} colour {image.resize((1, 1)).getpixel((0, 0))}".strip())
            for image, context in zip(images, contexts, strict=True)
        ]


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Meter]:
    class Mine(Meter):
        asked: list[list[str]] = []  # noqa: RUF012

    monkeypatch.setitem(plugins.CAPTIONERS, "meter", f"{__name__}:Chosen")
    monkeypatch.setattr(sys.modules[__name__], "Chosen", Mine, raising=False)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"w")
    return Mine


def uncaptioned(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True)
    for seed in range(number):
        picture(seed).save(folder / f"{seed:03}.png")
    return folder


def captioned(bench: Bench, folder: Path, extent: Extent | None = None, *, stop: Any = lambda: False,
              events: list[dict[str, Any]] | None = None, **settings: Any) -> Report:  # fmt: skip
    return caption_pictures(
        bench, sources(folder), CaptionsConfig.model_validate(settings), f"meter={folder.parent / 'weights'}",
        dataset="blobs", extent=extent or Extent(), on_event=(events if events is not None else []).append,
        should_stop=stop)  # fmt: skip


def stored_captions(bench: Bench) -> int:
    with bench.catalog.read() as session:
        return session.scalar(select(func.count(StoredCaption.id))) or 0


def test_pictures_without_a_caption_get_one_and_a_second_run_asks_nothing(
    bench: Bench, tmp_path: Path, meter: type[Meter]
):
    folder = uncaptioned(tmp_path / "data", 5)
    (folder / "000.txt").write_text("a person wrote this")
    before = tree_digest(folder)
    report = captioned(bench, folder, batch_size=3)
    assert (report.wanted, report.known, report.captioned, report.failed) == (4, 0, 4, [])
    assert meter.asked == [["001.png", "002.png", "003.png"], ["004.png"]]
    digest = sha256_of(folder / "002.png")
    (version,) = of_captioners(bench.catalog, [digest])[digest]
    assert version.text == f"colour {picture(2).resize((1, 1)).getpixel((0, 0))}"
    assert (version.author, version.revision, version.version) == ("meter", "r1", 1)
    again = captioned(bench, folder, batch_size=3)
    assert (again.wanted, again.known, again.captioned) == (4, 4, 0)
    assert len(meter.asked) == 2
    assert tree_digest(folder) == before


def test_another_prompt_or_revision_is_another_caption_and_overwriting_keeps_the_old(
    bench: Bench, tmp_path: Path, meter: type[Meter]
):
    folder = uncaptioned(tmp_path / "data", 2)
    captioned(bench, folder)
    assert captioned(bench, folder, prompts={"meter": "see {name}:"}).captioned == 2
    assert captioned(bench, folder, Extent(overwrite=True)).captioned == 2
    meter.revision = "r2"
    assert captioned(bench, folder).captioned == 2
    digest = sha256_of(folder / "001.png")
    versions = of_captioners(bench.catalog, [digest])[digest]
    assert [(one.revision, one.prompt, one.version) for one in versions] == [
        ("r2", "", 1), ("r1", "", 2), ("r1", "see 001:", 1), ("r1", "", 1)]  # fmt: skip


def test_pictures_of_equal_bytes_are_asked_once_and_all_shows_those_with_captions_too(
    bench: Bench, tmp_path: Path, meter: type[Meter]
):
    folder = uncaptioned(tmp_path / "data", 2)
    (folder / "copy.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "001.txt").write_text("a person wrote this")
    assert captioned(bench, folder).captioned == 1
    everything = captioned(bench, folder, Extent(everything=True))
    assert (everything.wanted, everything.known, everything.captioned) == (2, 1, 1)


def test_a_picture_that_cannot_be_captioned_costs_no_other_its_caption(
    bench: Bench, tmp_path: Path, meter: type[Meter]
):
    folder = uncaptioned(tmp_path / "data", 6)
    (folder / "003.png").write_bytes(b"no picture")
    meter.bad = "001.png"
    report = captioned(bench, folder)
    assert report.captioned == 4
    assert {one["file_name"]: one["error"].split(":")[0] for one in report.failed} == {
        "001.png": "ZeroDivisionError", "003.png": report.failed[0]["error"].split(":")[0]}  # fmt: skip
    meter.bad = ""
    assert (captioned(bench, folder).captioned, stored_captions(bench)) == (1, 5)  # what failed is tried again


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(bench: Bench, tmp_path: Path, meter: type[Meter]):
    folder = uncaptioned(tmp_path / "data", 10)
    meter.room = 2
    events: list[dict[str, Any]] = []
    assert captioned(bench, folder, batch_size=8, events=events).captioned == 10
    assert [len(names) for names in meter.asked] == [8, 4, 2, 2, 4, 2, 2, 2]
    assert [event["message"] for event in events if event["event"] == "log"] == [
        "out of memory with 8 pictures: it goes on with 4",
        "out of memory with 4 pictures: it goes on with 2",
    ]


def test_when_not_even_one_picture_fits_the_command_ends_in_one_line(bench: Bench, tmp_path: Path, meter: type[Meter]):
    meter.room = 0
    with pytest.raises(OutOfMemory, match="out of memory with one picture; choose a smaller model"):
        captioned(bench, uncaptioned(tmp_path / "data", 3))


def test_a_dry_run_shows_some_of_the_set_and_keeps_nothing(bench: Bench, tmp_path: Path, meter: type[Meter]):
    folder = uncaptioned(tmp_path / "data", 9)
    report = captioned(bench, folder, Extent(dry_run=3), policy="prose", prefix="icon,")
    assert [one["file_name"] for one in report.examples] == ["000.png", "003.png", "006.png"]
    assert report.examples[0]["caption"] == f"icon, {report.examples[0]['said']}"
    assert stored_captions(bench) == 0


def test_a_captioner_that_is_asked_to_stop_keeps_what_it_has(bench: Bench, tmp_path: Path, meter: type[Meter]):
    folder = uncaptioned(tmp_path / "data", 4)
    with pytest.raises(Stopped):
        captioned(bench, folder, batch_size=1, stop=lambda: len(meter.asked) == 2)
    assert captioned(bench, folder, batch_size=1).known == 2


def test_what_a_recipe_asks_of_a_picture_is_filled_in(bench: Bench, tmp_path: Path, meter: type[Meter]):
    folder = tmp_path / "data"
    pictures(folder / "3_sks fox", 1)
    (folder / "3_sks fox" / "000.txt").unlink()
    report = captioned(bench, folder, prompts={"meter": "a {class} in {folder}, {name}{trigger}:"})
    assert report.examples[0]["said"].startswith("a sks fox in 3_sks fox, 000: colour")


def test_sources_and_captioners_that_are_not_there_are_said_in_one_line(
    bench: Bench, tmp_path: Path, meter: type[Meter]
):
    with pytest.raises(BadInput, match="no such folder"):
        captioned(bench, tmp_path / "none")
    folder = uncaptioned(tmp_path / "data", 1)
    with pytest.raises(BadInput, match="no captioner is called 'metre'; did you mean 'meter'"):
        caption_pictures(bench, sources(folder), CaptionsConfig(), "metre=x", dataset="blobs", extent=Extent(),
                         on_event=lambda event: None)  # fmt: skip


KILLED = """
import sys, time
from pathlib import Path
from components.captioning import captioner, captioning
from components.config import CaptionsConfig
from components.stages import Bench
from components.workspace import Workspace
from tests.captioning import test_captioning
from tests.curation.folders import sources

home, folder, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

class Slow(test_captioning.Meter):
    def caption(self, images, contexts):
        time.sleep(pause)
        return super().caption(images, contexts)

test_captioning.Chosen = Slow
captioner.CAPTIONERS["meter"] = "tests.captioning.test_captioning:Chosen"
report = captioning.caption_pictures(
    Bench.open(Workspace(home)), sources(folder), CaptionsConfig(batch_size=2), f"meter={folder.parent / 'weights'}",
    dataset="blobs", extent=captioning.Extent(),
    on_event=lambda event: "stage" in event or print(event, flush=True))  # of captions, not of the scan
print(report.known, report.captioned)
"""


def test_a_kill_costs_no_more_than_the_batch_at_work(bench: Bench, tmp_path: Path, meter: type[Meter]):
    folder = uncaptioned(tmp_path / "data", 12)
    command = [sys.executable, "-c", KILLED, str(bench.workspace.home), str(folder), "0.3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(2)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert "'done': 4" in told[1]
    kept = stored_captions(bench)
    assert kept in (4, 6)  # the third batch may have been committed before the signal came
    report = captioned(bench, folder)
    assert (report.known, report.captioned, stored_captions(bench)) == (kept, 12 - kept, 12)
