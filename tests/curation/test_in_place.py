"""Pictures that are not copied: read where they are, and never with other bytes than were curated."""

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from components.catalog.differences import named_snapshot
from components.curation.dataset_folder import export_dataset
from components.curation.manifest import SampleRow
from components.curation.snapshots import curate_key
from components.errors import DamagedArtifact
from components.stages import Bench
from tests.chain import Chain
from tests.curation.folders import new_bench, tree_digest

IN_PLACE = "data.copy_pictures=false"


def export(chain: Chain, out: Path) -> None:
    snapshot = named_snapshot(chain.bench.catalog, chain.recipe().name)
    export_dataset(chain.bench, snapshot, out, on_progress=lambda done, total: None)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain.build(tmp_path)


def copies(bench: Bench, rows: list[SampleRow]) -> int:
    return sum(bench.store.path(row.sha256).exists() for row in rows)


def test_snapshot_and_cache_are_those_of_copied_pictures_and_nothing_is_copied(chain: Chain, tmp_path: Path):
    before = tree_digest(chain.pictures)
    copied, in_place = chain, Chain(new_bench(tmp_path / "other"), chain.recipe_path, chain.pictures, chain.base_path)
    rows = in_place.curate(in_place.recipe(IN_PLACE))
    assert rows == copied.curate(copied.recipe()) and copies(in_place.bench, rows) == 0
    assert in_place.cache(in_place.recipe(IN_PLACE)).outputs == copied.cache(copied.recipe()).outputs
    assert copies(in_place.bench, rows) == 0 and copies(copied.bench, rows) == len(rows)
    assert tree_digest(chain.pictures) == before


def test_who_wants_copies_later_gets_them_for_the_same_snapshot_without_a_decode(chain: Chain):
    recipes = chain.recipe(IN_PLACE), chain.recipe()
    keys = [curate_key(chain.bench, r.data, r.curation, dataset=r.name, training_size=32)[0] for r in recipes]
    assert keys[0] != keys[1]
    rows, digest = chain.curate(recipes[0]), chain.snapshot(recipes[0])
    assert chain.snapshot(recipes[1]) == digest and copies(chain.bench, rows) == len(rows)
    (chain.pictures / rows[0].file_name).unlink()
    assert chain.bench.store.read(rows[0].sha256)


def test_an_edited_or_deleted_file_is_named_and_putting_it_back_is_enough(chain: Chain):
    recipe = chain.recipe(IN_PLACE)
    (first, *_), digest = chain.curate(recipe), chain.snapshot(recipe)
    path = chain.pictures / first.file_name
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    said = re.escape(str(path)) + r": its bytes are not those that were curated, and the workspace has no copy; put"
    with pytest.raises(DamagedArtifact, match=said):
        chain.bench.store.read(first.sha256)
    path.unlink()
    with pytest.raises(DamagedArtifact, match=re.escape(str(path)) + ": No such file or directory, and the"):
        chain.bench.store.read(first.sha256)
    path.write_bytes(data)
    assert chain.bench.store.read(first.sha256) == data
    assert chain.snapshot(recipe) == digest and chain.cache(recipe).items


def test_bytes_that_have_moved_are_found_by_the_next_scan(chain: Chain):
    recipe = chain.recipe(IN_PLACE)
    first = chain.curate(recipe)[0]
    data = (chain.pictures / first.file_name).read_bytes()
    (chain.pictures / first.file_name).rename(chain.pictures / "moved.png")
    with pytest.raises(DamagedArtifact, match="No such file"):
        chain.bench.store.read(first.sha256)
    table = chain.pictures / "metadata.jsonl"
    table.write_text(table.read_text().replace(first.file_name, "moved.png"))
    assert "moved.png" in {row.file_name for row in chain.curate(recipe)}
    assert chain.bench.store.read(first.sha256) == data


def test_an_export_reads_each_picture_once_and_is_that_of_copied_pictures(
        chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chain.curate(chain.recipe())
    export(chain, tmp_path / "copied")
    in_place = Chain(new_bench(tmp_path / "other"), chain.recipe_path, chain.pictures, chain.base_path)
    rows = in_place.curate(in_place.recipe(IN_PLACE))
    read, read_bytes = Counter[Path](), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.update([path]), read_bytes(path))[1])
    export(in_place, tmp_path / "in-place")
    assert {path.name: times for path, times in read.items() if path.is_relative_to(chain.pictures)} == {
        row.file_name: 1 for row in rows}
    monkeypatch.undo()
    assert shards(tmp_path / "in-place") == shards(tmp_path / "copied")


def test_an_edit_in_place_is_another_picture_of_the_next_snapshot(chain: Chain):
    recipe = chain.recipe(IN_PLACE)
    first = chain.curate(recipe)[0]
    chain.cache(recipe)
    image = Image.open(chain.pictures / first.file_name).convert("RGB")
    image.putpixel((16, 16), (255, 254, 255))
    image.save(chain.pictures / first.file_name)
    again = {row.file_name: row for row in chain.curate(recipe)}[first.file_name]
    assert again.sha256 != first.sha256
    assert chain.cache(recipe).facts["encoded_images"] == 1
