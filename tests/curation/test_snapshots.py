"""Snapshots: every file kept or told why not, equal folders give equal bytes, a kill costs little."""

import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.catalog import datasets
from components.config import CurationConfig
from components.curation.examining import SHARD_ITEMS
from components.curation.manifest import SampleRow, read_manifest
from components.curation.pixels import rgb_digest
from components.curation.snapshots import curate, curate_key, sides_stand
from components.curation.splits import lot
from components.errors import BadInput, DamagedArtifact
from components.stages import Bench, Product, StageResult, ensure
from tests.curation.folders import curated, new_bench, picture, pictures, sources, table, tree_digest


def rejects(bench: Bench, product: Product) -> dict[str, str]:
    """File name -> the check that rejected it."""
    rows = pq.read_table(bench.store.path(product.outputs["verdicts"].sha256)).to_pylist()
    return {row["file_name"]: row["check"] for row in rows if row["decision"] == "reject"}


def samples(bench: Bench, product: Product) -> dict[str, SampleRow]:
    return {row.file_name: row for row in read_manifest(bench.store, product.facts["digest"])}


def header_only_png(side: int) -> bytes:
    """A PNG that claims side x side pixels and holds none."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# what is kept -------------------------------------------------------------------------------------------------------


def test_every_picture_of_a_sound_folder_is_kept_with_its_caption_and_size(bench: Bench, tmp_path: Path):
    product = curated(bench, pictures(tmp_path / "data", 12))
    rows = read_manifest(bench.store, product.facts["digest"])
    assert [(row.split, row.file_name) for row in rows] == sorted((row.split, row.file_name) for row in rows)
    assert {row.text for row in rows} == {f"blobs number {i}" for i in range(12)}
    assert {(row.width, row.height) for row in rows} == {(64, 64)}
    assert product.facts["kept"] == 12 and product.facts["rejected"] == 0
    assert product.facts["train"] + product.facts["test"] == 12 and product.facts["test"] > 0
    assert product.facts["digest"] == product.outputs["manifest"].sha256


def test_the_bytes_of_kept_samples_are_in_the_store(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    product = curated(bench, folder)
    for name, row in samples(bench, product).items():
        assert bench.store.read(row.sha256) == (folder / name).read_bytes()


def test_the_manifest_opens_as_a_hugging_face_dataset(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from datasets import load_dataset

    digest = curated(bench, pictures(tmp_path / "data", 4)).facts["digest"]
    manifest = str(bench.store.path(digest))
    rows = load_dataset("parquet", data_files=manifest, split="train", cache_dir=str(tmp_path / "c"))
    assert sorted(rows["text"]) == [f"blobs number {i}" for i in range(4)]


# bad input ----------------------------------------------------------------------------------------------------------


def test_bad_files_are_verdicts_and_the_sources_stay_as_they_were(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 10)
    whole = (folder / "000.png").read_bytes()
    for name, data in {
        "truncated.png": whole[: len(whole) // 2], "empty.png": b"", "text.png": b"I am a text, renamed",
        "bomb.png": header_only_png(100_000), "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a caption")
    picture(50).save(folder / "no-caption.png")
    picture(51).save(folder / "latin.png")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    picture(52, side=16).save(folder / "tiny.png")
    (folder / "tiny.txt").write_text("a tiny one")
    picture(53).resize((256, 64)).save(folder / "wide.png")
    (folder / "wide.txt").write_text("a wide one")
    os.mkfifo(folder / "pipe.png")
    before, started = tree_digest(folder), time.monotonic()

    product = curated(bench, folder)

    assert rejects(bench, product) == {
        "truncated.png": "unreadable", "empty.png": "unreadable", "text.png": "unreadable", "bomb.png": "unreadable",
        "vector.svg": "unreadable", "no-caption.png": "caption", "latin.png": "caption", "tiny.png": "tiny",
        "wide.png": "aspect", "pipe.png": "file"}
    assert product.facts["kept"] == 10 and product.facts["rejected"] == 10
    assert tree_digest(folder) == before
    assert time.monotonic() - started < 10


def test_two_unreadable_files_are_not_duplicates(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path, 2)
    for name in "xy":
        (folder / f"{name}.png").write_bytes(b"")
        (folder / f"{name}.txt").write_text("nothing")
    assert rejects(bench, curated(bench, folder)) == {"x.png": "unreadable", "y.png": "unreadable"}


def test_when_nothing_is_left_the_counts_per_reason_are_named(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)
    (folder / "000.png").write_bytes(b"")
    (folder / "001.txt").write_text("")
    with pytest.raises(BadInput, match=r"no picture is left of 2: (1 unreadable, 1 caption|1 caption, 1 unreadable)"):
        curated(bench, folder)
    assert datasets.list_snapshots(bench.catalog) == []


def test_strict_stops_at_the_first_reject_naming_the_file(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    (folder / "001.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"001\.png: unreadable: .*empty"):
        curated(bench, folder, strict=True)
    assert datasets.list_snapshots(bench.catalog) == []


def test_a_base_of_64_px_takes_pictures_of_64_px_and_a_larger_one_does_not(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    assert curated(bench, folder).facts["kept"] == 3
    with pytest.raises(BadInput, match="3 tiny"):
        curate(bench, sources(folder), CurationConfig(), dataset="blobs", training_size=512)


def test_a_file_that_changes_after_the_scan_is_not_taken_for_what_it_was(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)
    _, found = curate_key(bench, sources(folder), CurationConfig(), dataset="blobs", training_size=64)
    picture(9).save(folder / "000.png")
    with pytest.raises(DamagedArtifact, match=r"000\.png: changed"):
        curate(bench, sources(folder), CurationConfig(), dataset="blobs", training_size=64, scanned=found)


# duplicates ---------------------------------------------------------------------------------------------------------


def test_of_exact_duplicates_one_stays_also_across_containers(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    (folder / "copy.png").write_bytes((folder / "001.png").read_bytes())
    picture(1).save(folder / "other.bmp")
    for name in ("copy", "other"):
        (folder / f"{name}.txt").write_text("again")
    product = curated(bench, folder)
    assert rejects(bench, product) == {"001.png": "exact_duplicate", "copy.png": "exact_duplicate"}  # the BMP is larger
    assert product.facts["kept"] == 3


def test_of_near_duplicates_the_one_with_most_pixels_stays(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    picture(1, side=128).save(folder / "large.jpg", quality=90)
    (folder / "large.txt").write_text("again, larger")
    assert rejects(bench, curated(bench, folder)) == {"001.png": "near_duplicate"}
    kept = curated(bench, folder, near_duplicates=False)
    assert rejects(bench, kept) == {}
    assert len({samples(bench, kept)[name].component for name in ("001.png", "large.jpg")}) == 1  # yet never split


def test_the_eight_orientations_of_one_picture_are_one_picture(bench: Bench, tmp_path: Path):
    turns = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
             4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
             7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}  # what the tag will undo
    folder, upright = pictures(tmp_path / "data", 1), picture(5, side=96).crop((0, 0, 96, 72))
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        (upright if turn is None else upright.transpose(turn)).save(folder / f"o{orientation}.png", exif=exif)
        (folder / f"o{orientation}.txt").write_text("upright")
    product = curated(bench, folder)
    kept = [row for name, row in samples(bench, product).items() if name.startswith("o")]
    assert len(kept) == 1 and (kept[0].width, kept[0].height) == (96, 72)
    assert set(rejects(bench, product).values()) == {"exact_duplicate"}


def test_one_drawing_in_several_colours_is_several_samples(bench: Bench, tmp_path: Path):
    rows = []
    for shape in range(6):
        for name, colour in {"red": (220, 50, 60), "orange": (245, 140, 30), "blue": (40, 110, 230)}.items():
            pixels = np.full((64, 64, 3), colour, dtype=np.uint8)
            pixels[8 + 4 * shape : 30 + 4 * shape, 12:52] = 255
            pixels[:3] = pixels[-3:] = pixels[:, :3] = pixels[:, -3:] = 255
            (tmp_path / "data").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / f"{shape}-{name}.png")
            rows.append({"file_name": f"{shape}-{name}.png", "text": f"bar {shape}, {name}", "group": f"bar {shape}"})
    table(tmp_path / "data", rows)
    product = curated(bench, tmp_path / "data")
    assert rejects(bench, product) == {}
    assert product.facts["components"] == 6


# splits -------------------------------------------------------------------------------------------------------------


def test_groups_and_duplicates_never_cross_the_split(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 40)
    table(folder, [{"file_name": f"{i:03}.png", "text": f"number {i}", "group": f"g{i // 4}"} for i in range(40)])
    rows = samples(bench, curated(bench, folder, test_fraction=0.3)).values()
    sides = {group: {row.split for row in rows if row.group == group} for group in {row.group for row in rows}}
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == 10


def test_a_leak_that_the_data_asks_for_is_refused_naming_both_files(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)
    picture(1).save(folder / "again.jpg", quality=95)
    table(folder, [{"file_name": "000.png", "text": "a", "split": "train"},
                   {"file_name": "001.png", "text": "b", "split": "train"},
                   {"file_name": "again.jpg", "text": "c", "split": "test"}])
    with pytest.raises(BadInput, match=r"leak: 001\.png is in train and again\.jpg is in test"):
        curated(bench, folder)


def test_new_pictures_and_better_copies_move_no_old_one(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 30)
    before = {name: row.split for name, row in samples(bench, curated(bench, folder)).items()}
    pictures(folder, 30, first=30)
    for i in range(0, 30, 3):
        picture(i, side=160).save(folder / f"better-{i:03}.png")
        (folder / f"better-{i:03}.txt").write_text(f"blobs number {i}")
    after = samples(bench, curated(bench, folder))
    for name, side in before.items():
        row = after.get(name) or after[f"better-{name}"]
        assert row.split == side


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, str]:
    """A folder where large.png is kept and its twin 001.png dropped, and a salt by which the two draw train together
    and the dropped one draws test alone."""
    folder, dropped = pictures(tmp_path / "data", 6), rgb_digest(picture(1))
    large = next(twin for twin in (picture(1, side=side) for side in range(96, 160)) if rgb_digest(twin) < dropped)
    large.save(folder / "large.png")  # the pair has the name, and so the lot, of the lower digest
    (folder / "large.txt").write_text("again, larger")
    return folder, next(salt for salt in map(str, range(1000)) if lot(salt, f"pixels {rgb_digest(large)}") >= 0.5
                        and lot(salt, f"pixels {dropped}") < 0.5)


def test_a_dropped_twin_has_the_side_of_the_one_that_was_kept_once_that_is_gone(
    bench: Bench, twins: tuple[Path, str]
):
    folder, salt = twins
    settings = {"split_salt": salt, "test_fraction": 0.5}
    first = curated(bench, folder, **settings)
    assert rejects(bench, first) == {"001.png": "near_duplicate"}
    assert samples(bench, first)["large.png"].split == "train"
    for name in ("large.png", "large.txt"):
        (folder / name).unlink()
    assert samples(bench, curated(bench, folder, **settings))["001.png"].split == "train"
    new = new_bench(folder.parent / "new")
    assert samples(new, curated(new, folder, **settings))["001.png"].split == "test"


def test_a_dropped_twin_that_was_gone_while_nothing_else_changed_keeps_its_side_too(
    bench: Bench, twins: tuple[Path, str]
):
    folder, salt = twins
    settings = {"split_salt": salt, "test_fraction": 0.5}
    with_it = curated(bench, folder, **settings)
    (folder / "001.png").rename(folder.parent / "away.png")
    without = curated(bench, folder, **settings)
    assert without.facts["snapshot_id"] == with_it.facts["snapshot_id"]  # the same manifest, made once more
    (folder / "large.png").unlink()
    curated(bench, folder, **settings)
    (folder.parent / "away.png").rename(folder / "001.png")
    assert samples(bench, curated(bench, folder, **settings))["001.png"].split == "train"


def staged(bench: Bench, folder: Path, **settings: object) -> StageResult:
    """As a run makes or reuses a snapshot."""
    curation, sizes = CurationConfig.model_validate(settings), {"dataset": "blobs", "training_size": 64}
    key, scanned = curate_key(bench, sources(folder), curation, **sizes)
    return ensure(bench, "curate", key,
                  lambda: curate(bench, sources(folder), curation, scanned=scanned, key=key, **sizes),
                  still_there=lambda product: sides_stand(bench, curation, "blobs", product))


def test_a_snapshot_is_not_reused_where_a_later_one_has_trained_on_what_it_tests(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 8)

    def of_groups(**groups: str) -> StageResult:
        table(folder, [{"file_name": path.name, "text": path.name, "group": groups.get(path.stem)}
                       for path in sorted(folder.glob("*.png"))])
        return staged(bench, folder, test_fraction=0.3)

    first = of_groups()
    sides = {name: row.split for name, row in samples(bench, first.product).items()}
    tested, trained = (next(name[:-4] for name in sides if sides[name] == side) for side in ("test", "train"))
    assert of_groups().outcome == "reused"
    joined = of_groups(**{tested: "one", trained: "one"})
    assert samples(bench, joined.product)[f"{tested}.png"].split == "train"

    back = of_groups()
    assert back.key == first.key and back.outcome != "reused"
    assert {name: row.split for name, row in samples(bench, back.product).items()} == sides | {f"{tested}.png": "train"}
    assert of_groups().outcome == "reused"


def test_data_that_takes_its_word_on_a_side_back_is_made_once_and_then_reused(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 4)

    def stated(side: str) -> StageResult:
        table(folder, [{"file_name": path.name, "text": path.name, "split": side if path.stem == "000" else "train"}
                       for path in sorted(folder.glob("*.png"))])
        return staged(bench, folder)

    first, second = stated("test"), stated("train")
    assert (first.outcome, second.outcome) == ("produced", "produced")
    again = stated("test")
    assert again.product.outputs["manifest"] == first.product.outputs["manifest"]
    assert stated("test").outcome == "reused"


def test_a_picture_that_was_gone_for_a_version_comes_back_to_the_side_it_had(bench: Bench, tmp_path: Path):
    def place(seed: int) -> float:
        return lot("safelight", f"pixels {rgb_digest(picture(seed))}")

    lowest, low, high = sorted((seed for seed in range(20) if place(seed) > 0.1), key=place)[:3]  # lots say train
    folder = pictures(tmp_path / "data", 1, first=low)
    pictures(folder, 1, first=high)
    first = samples(bench, curated(bench, folder))
    assert first[f"{low:03}.png"].split == "test"  # since one side must not stay empty
    (folder / f"{low:03}.png").unlink()
    curated(bench, folder)
    for seed in (lowest, low):
        pictures(folder, 1, first=seed)
    again = samples(bench, curated(bench, folder))
    assert {name: again[name].split for name in first} == {name: row.split for name, row in first.items()}


# again, and again ---------------------------------------------------------------------------------------------------


def test_equal_folders_give_equal_manifests_in_other_places_and_workspaces(bench: Bench, tmp_path: Path):
    one = curated(bench, pictures(tmp_path / "one", 10))
    two = curated(new_bench(tmp_path / "elsewhere"), pictures(tmp_path / "two", 10))
    assert one.outputs == two.outputs


def test_an_unchanged_folder_has_the_same_key_and_nothing_is_decoded_again(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 5)

    def key(**settings: object) -> str:
        return curate_key(bench, sources(folder), CurationConfig.model_validate(settings), dataset="blobs",
                          training_size=64)[0]

    first, product = key(), curated(bench, folder)
    assert key() == first
    assert product.facts["examined"] == 5 and curated(bench, folder).facts["examined"] == 0
    assert key(max_aspect=2.0) != first
    (folder / "000.txt").write_text("another caption")
    assert key() != first


def test_one_changed_file_costs_one_decode_and_makes_the_next_version(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 100)
    first = curated(bench, folder)
    picture(999).save(folder / "007.png")
    second = curated(bench, folder)
    assert (first.facts["examined"], second.facts["examined"]) == (100, 1)
    assert (first.facts["version"], second.facts["version"]) == (1, 2)


def test_a_folder_put_back_is_its_old_version_and_another_dataset_counts_for_itself(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 5)
    first = curated(bench, folder)
    pictures(folder, 1, first=5)
    assert curated(bench, folder).facts["version"] == 2
    (folder / "005.png").unlink()
    again = curated(bench, folder)
    assert (again.facts["version"], again.outputs["manifest"]) == (1, first.outputs["manifest"])
    assert curated(bench, folder, dataset="other").facts["version"] == 1
    assert [row.version for row in datasets.list_snapshots(bench.catalog, "blobs")] == [2, 1]


def test_a_lost_object_is_copied_from_the_source_again(bench: Bench, tmp_path: Path):
    product = curated(bench, pictures(tmp_path / "data", 2))
    row = next(iter(samples(bench, product).values()))
    bench.store.path(row.sha256).unlink()
    assert curated(bench, tmp_path / "data").facts["examined"] == 0
    assert bench.store.read(row.sha256)


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.curation.folders import new_bench, sources
from components.config import CurationConfig
from components.curation.snapshots import curate
def die(done, total):
    if done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
curate(new_bench(Path(sys.argv[1])), sources(Path(sys.argv[2])), CurationConfig(), dataset="blobs", training_size=64,
       on_progress=die)
"""


def test_after_a_kill_only_uncommitted_images_are_decoded_again_for_the_same_manifest(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", SHARD_ITEMS + 10)
    unbroken = curated(new_bench(tmp_path / "unbroken"), folder)
    child = subprocess.run([sys.executable, "-c", CHILD, str(bench.workspace.home), str(folder), str(SHARD_ITEMS)],
                           cwd=Path(__file__).parents[2], check=False)
    assert child.returncode == -signal.SIGKILL
    resumed = curated(bench, folder)
    assert resumed.facts["examined"] == 10
    assert resumed.outputs == unbroken.outputs


def test_an_animated_picture_and_a_cmyk_one_are_kept_and_flagged(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 1)
    frames = io.BytesIO()
    picture(20).save(frames, "GIF", save_all=True, append_images=[picture(21)])
    (folder / "moving.gif").write_bytes(frames.getvalue())
    picture(22).convert("CMYK").save(folder / "print.jpg")
    for name in ("moving", "print"):
        (folder / f"{name}.txt").write_text("unusual")
    product = curated(bench, folder)
    assert product.facts["kept"] == 3
    assert product.facts["flags"].keys() >= {"frames", "colours"}


# licences -----------------------------------------------------------------------------------------------------------


def test_only_pictures_under_an_allowed_licence_are_kept_and_the_others_say_what_was_found(
    bench: Bench, tmp_path: Path
):
    folder = pictures(tmp_path / "data", 4)
    licences = ["CC0-1.0", "cc-by-4.0", "CC-BY-NC-4.0", None]
    table(folder, [{"file_name": f"{i:03}.png", "text": f"number {i}", "author": f"a{i}", "source": f"s{i}",
                    **({"licence": licence} if licence else {})} for i, licence in enumerate(licences)])
    product = curated(bench, folder, licences=["CC0-1.0", "CC-BY-4.0"])
    assert rejects(bench, product) == {"002.png": "licence", "003.png": "licence"}
    rows = pq.read_table(bench.store.path(product.outputs["verdicts"].sha256)).to_pylist()
    assert {row["reason"] for row in rows if row["check"] == "licence"} == {
        "Its licence is CC-BY-NC-4.0; the recipe allows CC0-1.0, CC-BY-4.0.",
        "It states no licence; the recipe allows CC0-1.0, CC-BY-4.0."}
    kept = [(row.licence, row.author, row.source) for row in samples(bench, product).values()]
    assert sorted(kept) == [("CC0-1.0", "a0", "s0"), ("cc-by-4.0", "a1", "s1")]


def test_a_duplicate_under_a_licence_that_is_not_allowed_does_not_displace_one_that_is(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    picture(1).save(folder / "larger.bmp")  # of equal pixels the larger file is kept, were it allowed
    table(folder, [{"file_name": name, "text": name, "licence": "NOASSERTION" if name == "larger.bmp" else "MIT"}
                   for name in ("000.png", "001.png", "002.png", "larger.bmp")])
    assert rejects(bench, curated(bench, folder, licences=["MIT"])) == {"larger.bmp": "licence"}


def test_a_recipe_without_licences_has_the_key_that_it_had_before_there_were_any(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)

    def key(**settings: object) -> str:
        return curate_key(bench, sources(folder), CurationConfig.model_validate(settings), dataset="blobs",
                          training_size=64)[0]

    assert key() == key(licences=None) and key(licences=["MIT"]) != key()
    assert "licences" not in CurationConfig().settings()
    with pytest.raises(ValueError, match="at least 1"):
        CurationConfig.model_validate({"licences": []})
