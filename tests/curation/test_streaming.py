"""Data sets of the hub that are streamed: the same snapshot, nothing kept but pictures, and nothing asked for twice."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem
from PIL import Image

from components.config import CurationConfig, DataConfig
from components.curation.manifest import read_manifest
from components.curation.scanning import scan
from components.curation.snapshots import curate
from components.curation.sources import require_folders, require_pictures
from components.errors import BadInput
from components.stages import Bench, Product
from tests.curation.folders import new_bench, pictures, tree_digest
from tests.curation.hub import serving
from tests.curation.test_layouts import COMMIT, WAYS, write_tar

NAME = "someone/blobs"
FOOTER = 1 << 16  # bytes at its end that a reader of Parquet asks for first


def streamed(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"sources": [{"path": NAME, "revision": COMMIT, "streaming": True, **settings}]})


def noise(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def snapshot(bench: Bench, data: DataConfig) -> Product:
    return curate(bench, data, CurationConfig(), dataset="blobs", training_size=64)


@pytest.mark.parametrize("way", ["parquet by datasets", "webdataset"])
def test_a_streamed_data_set_is_the_snapshot_of_the_downloaded_one_and_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
):
    folder = WAYS[way][1](tmp_path / "data")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    before = tree_digest(folder)
    downloaded = snapshot(new_bench(tmp_path / "one"), DataConfig.model_validate({"sources": [{"path": str(folder)}]}))
    bench = new_bench(tmp_path / "other")
    with serving(folder, NAME, COMMIT, monkeypatch) as hub:
        first = snapshot(bench, streamed())
        assert {name: first.outputs[name] for name in ("manifest", "verdicts")} == {
            name: downloaded.outputs[name] for name in ("manifest", "verdicts")
        }
        assert first.facts["sources"][0]["skipped"] == downloaded.facts["sources"][0]["skipped"] == {"hidden": 1}
        rows = read_manifest(bench.store, first.facts["digest"])
        assert rows and all(bench.store.path(row.sha256).exists() for row in rows)
        HfFileSystem.clear_instance_cache()
        asked = hub.asked
        hub.away = True
        assert snapshot(bench, streamed()).outputs == first.outputs and hub.asked == asked
        assert not [path for path in (tmp_path / "other").rglob("*") if path.suffix in (".parquet", ".tar")]

        hub.away = False
        lost = bench.store.path(rows[0].sha256)
        data = lost.read_bytes()
        lost.unlink()
        assert snapshot(bench, streamed()).outputs == first.outputs and lost.read_bytes() == data
    assert tree_digest(folder) == before


@pytest.mark.parametrize("ending", [".parquet", ".tar"])
def test_the_hub_sends_every_byte_twice_and_little_more(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
):
    """Once to know the pictures by their digests, once to check and keep them; a table's footer at each opening."""
    path, bodies = tmp_path / "data" / f"all{ending}", [noise(seed) for seed in range(60)]
    path.parent.mkdir()
    if ending == ".parquet":
        rows = [{"image": body, "text": f"noise {i}"} for i, body in enumerate(bodies)]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    else:
        named = {f"{i:02}.png": body for i, body in enumerate(bodies)}
        write_tar(path, named | {f"{i:02}.txt": b"noise" for i in range(len(bodies))})
    with serving(path.parent, NAME, COMMIT, monkeypatch) as hub:
        assert snapshot(bench, streamed()).facts["examined"] == len(bodies)
        assert 2 * sum(map(len, bodies)) <= hub.sent <= 2 * path.stat().st_size + 4 * FOOTER


def test_a_hub_that_is_away_is_one_line_and_nothing_is_remembered_of_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = WAYS["parquet by datasets"][1](tmp_path / "data")
    with serving(folder, NAME, COMMIT, monkeypatch) as hub:
        hub.away = True
        with pytest.raises(BadInput, match=f"data set {NAME}@{COMMIT}: the hub gave .*; check id and revision") as said:
            scan(bench, streamed())
        assert "\n" not in str(said.value)
        hub.away = False
        HfFileSystem.clear_instance_cache()
        assert len(scan(bench, streamed()).files) > 0


def test_loose_pictures_are_not_streamed(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = pictures(tmp_path / "data", 2)
    with (
        serving(folder, NAME, COMMIT, monkeypatch),
        pytest.raises(BadInput, match="which alone can be streamed; leave streaming out"),
    ):
        scan(bench, streamed())


def test_a_stream_needs_a_commit_and_counts_no_files(tmp_path: Path):
    with pytest.raises(ValueError, match="streaming is for a data set of the hub; name its commit as revision"):
        DataConfig.model_validate({"sources": [{"path": NAME, "streaming": True}]})
    with pytest.raises(BadInput, match="--when-new: counts picture files"):
        require_folders(streamed())
    require_pictures(streamed())  # asks nobody
