"""An exported snapshot: `datasets` opens it as it is, its card says what is in it, a kill leaves all or nothing."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from components.catalog import runs
from components.catalog.differences import named_snapshot
from components.catalog.models import Snapshot
from components.curation import dataset_folder
from components.curation.dataset_folder import DatasetFolder, export_dataset
from components.curation.manifest import read_manifest
from components.curation.masks import mask_png
from components.curation.pixels import decode
from components.errors import BadInput, DamagedArtifact
from components.stages import Bench, Product, StageResult
from tests.curation.folders import curated, picture, pictures, table

LICENCES = ("CC0-1.0", "CC-BY-4.0", "LicenseRef-house", None)


def exported(bench: Bench, out: Path, name: str = "blobs") -> DatasetFolder:
    return export_dataset(bench, named_snapshot(bench.catalog, name), out, on_progress=lambda done, total: None)


def opened(folder: Path, cache: Path) -> Any:
    """The folder as `datasets` reads it."""
    from datasets import load_dataset

    return load_dataset(str(folder), cache_dir=str(cache))


def licensed(folder: Path, number: int) -> Path:
    """Pictures with captions, licences, authors and sources in a table; every fourth is in test."""
    pictures(folder, number)
    table(folder, [{"file_name": f"{i:03}.png", "text": f"blobs number {i}", "author": "Ana", "group": f"g{i}",
                    "split": "test" if i % 4 == 0 else "train", "source": f"https://pictures.example/{i}",
                    **({"licence": LICENCES[i % 4]} if LICENCES[i % 4] else {})} for i in range(number)])
    return folder


def test_datasets_opens_it_with_the_splits_pixels_captions_and_provenance_of_the_snapshot(bench: Bench, tmp_path: Path):
    folder = licensed(tmp_path / "data", 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(50, side=96).crop((0, 0, 96, 72)).save(folder / "001.png", exif=exif)
    digest = curated(bench, folder).facts["digest"]
    found = opened(exported(bench, tmp_path / "out").folder, tmp_path / "cache")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 9, "test": 3}
    rows = read_manifest(bench.store, digest)
    for row, sample in zip(rows, [*found["test"], *found["train"]], strict=True):
        assert np.array_equal(np.asarray(sample["image"]), np.asarray(decode(bench.store.read(row.sha256))))
        for name in ("text", "file_name", "sha256", "licence", "author", "source", "group", "width", "height"):
            assert sample[name] == getattr(row, name)
    assert {row.split: row.file_name for row in rows if row.file_name == "001.png"} == {"train": "001.png"}


def test_masks_and_further_captions_are_columns_where_there_are_any(bench: Bench, tmp_path: Path):
    from components.config import CurationConfig, DataConfig, DataSource
    from components.curation.snapshots import curate

    folder = pictures(tmp_path / "data", 3)
    (folder / "000.txt").write_text("one\nanother\na third\n")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    (folder / "001-masklabel.png").write_bytes(mask_png(mask))
    source = DataSource(path=str(folder), masks="masklabel", caption_lines="variants")
    curate(bench, DataConfig(sources=(source,)), CurationConfig(), dataset="blobs", training_size=64)
    found = opened(exported(bench, tmp_path / "out").folder, tmp_path / "cache")
    samples = {sample["file_name"]: sample for rows in found.values() for sample in rows}
    assert samples["000.png"]["variants"] == ["another", "a third"] and samples["000.png"]["mask"] is None
    assert np.array_equal(np.asarray(samples["001.png"]["mask"]), np.asarray(mask))


def test_the_card_counts_licences_sources_and_rejects_and_knows_the_rules_and_the_split(bench: Bench, tmp_path: Path):
    folder = licensed(tmp_path / "data", 8)
    (folder / "007.png").write_bytes(b"")
    product = curated(bench, folder, min_side=32)
    with bench.catalog.write() as session:
        session.query(Snapshot).one().stage_key = "k"
    uid = runs.open_run(bench.catalog, name="blobs", kind="retrain", git_commit=None,
                        recipe={"curation": {"min_side": 32, "test_fraction": 0.25, "split_salt": "pepper"}})
    runs.record_stage(bench.catalog, uid, StageResult("curate", "k", "produced", 1.0, Product(product.outputs)))
    text = exported(bench, tmp_path / "out").card.read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == ["cc-by-4.0", "cc0-1.0", "unknown", "other"]
    assert front["license_name"] == "LicenseRef-house" and front["size_categories"] == ["n<1K"]
    assert front["configs"] == [{"config_name": "default", "data_files": [
        {"split": "test", "path": "data/test-*"}, {"split": "train", "path": "data/train-*"}]}]
    assert [split["num_examples"] for split in front["dataset_info"]["splits"]] == [2, 5]
    for line in ("| CC-BY-4.0 | 2 |", "| not stated | 1 |", "| pictures.example | 7 |", "| unreadable | reject | 1 |",
                 "| `min_side` | 32 |", "with `pepper`, a share of 0.25 to test", product.facts["digest"],
                 "7 files were kept, 1 rejected", "Safelight wrote none of them"):
        assert line in text
    assert str(tmp_path) not in text


def test_a_folder_of_one_stated_licence_has_that_one(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)
    table(folder, [{"file_name": f"{i:03}.png", "text": f"number {i}", "licence": "CC0-1.0"} for i in range(2)])
    curated(bench, folder)
    front = yaml.safe_load(exported(bench, tmp_path / "out").card.read_text(encoding="utf-8").split("---")[1])
    assert front["license"] == "cc0-1.0" and "license_name" not in front


@pytest.mark.parametrize("held", ["file.txt", ".hidden"])
def test_a_folder_that_holds_something_is_refused_and_stays_as_it_was(bench: Bench, tmp_path: Path, held: str):
    curated(bench, pictures(tmp_path / "data", 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / held).write_text("mine")
    with pytest.raises(BadInput, match="holds something already; give --out"):
        exported(bench, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [held]
    with pytest.raises(BadInput, match="is a file"):
        exported(bench, tmp_path / "out" / held)


def test_an_empty_folder_is_taken_and_a_lost_picture_leaves_no_folder(bench: Bench, tmp_path: Path):
    digest = curated(bench, pictures(tmp_path / "data", 3)).facts["digest"]
    (tmp_path / "out").mkdir()
    assert exported(bench, tmp_path / "out").card.exists()
    row = read_manifest(bench.store, digest)[0]
    bench.store.path(row.sha256).unlink()
    assert exported(bench, tmp_path / "from the source").card.exists()
    (tmp_path / "data" / row.file_name).unlink()
    with pytest.raises(DamagedArtifact, match=f"{row.file_name}: No such file or directory, and the workspace has no"):
        exported(bench, tmp_path / "other")
    assert not (tmp_path / "other").exists()


CHILD = """
import os, signal, sys
from pathlib import Path
from components.catalog.differences import named_snapshot
from components.curation import dataset_folder
from tests.curation.folders import new_bench
dataset_folder.SHARD_BYTES = int(sys.argv[3])
def die(done, total):
    if done >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
bench = new_bench(Path(sys.argv[1]))
dataset_folder.export_dataset(bench, named_snapshot(bench.catalog, "blobs"), Path(sys.argv[2]), on_progress=die)
"""


def test_after_a_kill_nothing_is_there_and_the_same_command_goes_on_to_the_same_bytes(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    curated(bench, pictures(tmp_path / "data", 12), test_fraction=0.25)
    monkeypatch.setattr(dataset_folder, "SHARD_BYTES", 3 * 8000)  # about three pictures
    unbroken = exported(bench, tmp_path / "unbroken")
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, str(bench.workspace.home), str(out), "24000", "6"]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    (tmp_path / ".out.partial" / "data" / ".train-00001.x.part").write_bytes(b"cut off")
    resumed = exported(bench, out)
    assert resumed.reused >= 1

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(out) == files(unbroken.folder) and len(files(out)) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "home", "out", "unbroken"]


def test_what_an_export_of_another_version_left_is_not_gone_on_with(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    curated(bench, folder)
    left = tmp_path / ".out.partial"
    (left / "data").mkdir(parents=True)
    (left / dataset_folder.MARK).write_text("1 another")
    (left / "data" / "train-00000-of-00001.parquet").write_bytes(b"of another")
    made = exported(bench, tmp_path / "out")
    assert made.reused == 0 and sum(split.samples for split in made.splits) == 3
