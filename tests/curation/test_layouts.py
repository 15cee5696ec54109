"""Every layout people bring gives the same samples; what is skipped is listed; nothing outside is opened."""

import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from components.config import CurationConfig, DataConfig
from components.curation.items import Item
from components.curation.manifest import read_manifest
from components.curation.scanning import scan
from components.curation.snapshots import curate
from components.curation.sources import LAYOUTS, Reading, read_data
from components.errors import BadInput
from components.stages import Bench
from tests.curation.folders import picture, pictures, table, tree_digest
from tests.curation.listening import listening

NUMBER = 4


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def data(*paths: Path | str, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"sources": [{"path": str(path), **settings} for path in paths]})


def read(path: Path, **settings: object) -> Reading:
    return read_data(data(path, **settings))


def items(path: Path, **settings: object) -> dict[str, Item]:
    return {item.file_name: item for item in read(path, **settings).items}


def skipped(path: Path, **settings: object) -> dict[str, str]:
    return {one.file_name: one.reason for one in read(path, **settings).sources[0].skipped}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


# one data set in every layout -----------------------------------------------------------------------------------------


def as_folder(root: Path) -> Path:
    return pictures(root, NUMBER)


def as_table(root: Path, suffix: str, name: str, caption: str) -> Path:
    rows = [{name: f"{i:03}.png", caption: f"blobs number {i}"} for i in range(NUMBER)]
    for path in pictures(root, NUMBER).glob("*.txt"):
        path.unlink()
    match suffix:
        case "jsonl":
            table(root, rows)
        case "csv":
            pa.csv.write_csv(pa.Table.from_pylist(rows), root / "metadata.csv")
        case _:
            pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    return root


def as_json(root: Path, name: str, entry: Callable[[int], tuple[str, Any]]) -> Path:
    for path in pictures(root, NUMBER).glob("*.txt"):
        path.unlink()
    (root / name).write_text(json.dumps(dict(entry(i) for i in range(NUMBER))))
    return root


def as_tree(root: Path) -> Path:
    pictures(root / "3_sks blob", 2)
    return pictures(root / "1_blob", 2, first=2).parent


def as_webdataset(root: Path) -> Path:
    for shard in range(2):
        write_tar(root / f"{shard:05}.tar", {
            f"./{i:03}.{ending}": body for i in range(2 * shard, 2 * shard + 2) for ending, body in
            (("png", png(i)), ("txt", f"blobs number {i}\n".encode()), ("json", b'{"caption": "another"}'))})
    return root


def dataset() -> Dataset:
    rows = {"image": [{"bytes": png(i), "path": f"{i:03}.png"} for i in range(NUMBER)],
            "text": [f"blobs number {i}" for i in range(NUMBER)]}
    return Dataset.from_dict(rows, Features({"image": Image(), "text": Value("string")}))


def as_parquet(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    dataset().to_parquet(root / "data" / "train-00000-of-00001.parquet", batch_size=3)
    return root


def as_arrow(root: Path) -> Path:
    dataset().save_to_disk(root, num_shards=2)
    return root


def as_plain_parquet(root: Path) -> Path:
    root.mkdir()
    rows = [{"jpg": png(i), "caption": f"blobs number {i}"} for i in range(NUMBER)]
    pq.write_table(pa.Table.from_pylist(rows), root / "pictures.parquet", row_group_size=3)
    return root / "pictures.parquet"


WAYS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "captions beside": ("folder", as_folder),
    "jsonl": ("folder", lambda root: as_table(root, "jsonl", "image_path", "caption")),
    "csv": ("folder", lambda root: as_table(root, "csv", "file_name", "prompt")),
    "parquet table": ("folder", lambda root: as_table(root, "parquet", "filename", "text")),
    "diffusion-pipe": ("folder", lambda root: as_json(
        root, "captions.json", lambda i: (f"{i:03}.png", [f"blobs number {i}"]))),
    "kohya's fine-tuning": ("folder", lambda root: as_json(
        root, "meta.json", lambda i: (f"{i:03}", {"caption": f"blobs number {i}", "train_resolution": [64, 64]}))),
    "kohya": ("kohya", as_tree),
    "webdataset": ("webdataset", as_webdataset),
    "one tar": ("webdataset", lambda root: as_webdataset(root) / "00000.tar"),
    "parquet by datasets": ("dataset", as_parquet),
    "arrow by datasets": ("dataset", as_arrow),
    "parquet by pyarrow": ("dataset", as_plain_parquet),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_layout_is_told_from_its_names_and_gives_the_same_samples(bench: Bench, tmp_path: Path, way: str):
    layout, make = WAYS[way]
    path = make(tmp_path / "data")
    before = tree_digest(tmp_path / "data")
    found = scan(bench, data(path))
    assert [source.layout for source in found.sources] == [layout]
    made = curate(bench, data(path), CurationConfig(), dataset="blobs", training_size=64, scanned=found)
    rows = read_manifest(bench.store, made.outputs["manifest"].sha256)
    expected = 2 if way == "one tar" else NUMBER
    plain = {(sha256_of_png(i), f"blobs number {i}") for i in range(expected)}
    assert {(row.sha256, row.text) for row in rows} == plain
    assert all(bench.store.read(row.sha256) for row in rows)
    assert made.facts["sources"][0]["layout"] == layout
    assert tree_digest(tmp_path / "data") == before


def sha256_of_png(seed: int) -> str:
    from hashlib import sha256

    return sha256(png(seed)).hexdigest()


def test_the_recipe_may_name_the_layout(tmp_path: Path):
    tree = as_tree(tmp_path / "data")
    assert {item.repeats for item in read(tree, layout="folder").items} == {1}
    assert {layout.name for layout in LAYOUTS} | {"auto"} == set(
        DataConfig.model_json_schema()["$defs"]["DataSource"]["properties"]["layout"]["enum"])


# kohya's trees ------------------------------------------------------------------------------------------------------


def test_a_folder_without_repeats_in_its_name_is_left_out_of_a_kohya_tree_with_a_reason(tmp_path: Path):
    as_tree(tmp_path)
    pictures(tmp_path / "rest", 1, first=8)
    assert {item.file_name.split("/")[0] for item in read(tmp_path).items} == {"1_blob", "3_sks blob"}
    assert skipped(tmp_path) == dict.fromkeys(
        ["rest/008.png", "rest/008.txt"], 'in no folder that is named like 10_tokens, where kohya\'s trainers look for'
        ' pictures; set layout = "folder" to read it')


def test_repeats_of_sources_and_folders_multiply(tmp_path: Path):
    as_tree(tmp_path / "tree")
    pictures(tmp_path / "flat", 1, first=9)
    sources = DataConfig.model_validate({"sources": [
        {"path": str(tmp_path / "tree"), "repeats": 2}, {"path": str(tmp_path / "flat"), "repeats": 5}]})
    assert Counter(item.repeats for item in read_data(sources).items) == {6: 2, 2: 2, 5: 1}


def test_pictures_of_the_class_are_marked_and_stay_out_of_the_test_split(bench: Bench, tmp_path: Path):
    pictures(tmp_path / "data", 6)
    pictures(tmp_path / "reg" / "1_blob", 6, first=20)
    for path in (tmp_path / "reg").rglob("*.txt"):
        path.unlink()
    picture(3, side=128).save(tmp_path / "reg" / "1_blob" / "as-in-the-data.png")
    sources = DataConfig.model_validate({"sources": [
        {"path": str(tmp_path / "data")}, {"path": str(tmp_path / "reg"), "is_reg": True}]})
    made = curate(bench, sources, CurationConfig(test_fraction=0.5), dataset="blobs", training_size=64)
    rows = read_manifest(bench.store, made.outputs["manifest"].sha256)
    assert Counter((row.is_reg, row.text == "blob") for row in rows) == {(False, False): 6, (True, True): 6}
    assert {row.split for row in rows if row.is_reg} == {"train"}
    assert {row.split for row in rows if not row.is_reg} == {"train", "test"}


# captions -----------------------------------------------------------------------------------------------------------


def test_a_table_counts_before_a_caption_file_and_that_before_another_trainers_json(tmp_path: Path):
    pictures(tmp_path, 3)
    (tmp_path / "002.txt").unlink()
    (tmp_path / "captions.json").write_text(json.dumps({f"{i:03}.png": [f"json {i}", "other"] for i in range(3)}))
    assert [(item.caption, item.variants) for item in items(tmp_path).values()] == [
        ("blobs number 0", ()), ("blobs number 1", ()), ("json 2", ("other",))]
    table(tmp_path, [{"file_name": "000.png", "text": "listed"}])
    (tmp_path / "002.txt").write_text("beside")
    assert [item.caption for item in items(tmp_path).values()] == ["listed", "blobs number 1", "beside"]
    assert skipped(tmp_path)["captions.json"] == "metadata.jsonl speaks for this folder"


def test_a_json_file_that_says_nothing_of_the_pictures_is_skipped(tmp_path: Path):
    pictures(tmp_path, 1)
    (tmp_path / "captions.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "meta.json").write_text("[1, 2")
    assert set(skipped(tmp_path)) == {"captions.json", "meta.json"}


def test_kohyas_fine_tuning_file_joins_caption_and_tags(tmp_path: Path):
    as_json(tmp_path, "meta.json", lambda i: (f"{i:03}", {"caption": "a blob", "tags": "red, soft"}))
    assert {item.caption for item in read(tmp_path).items} == {"a blob, red, soft"}


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a\0.png", "..\\secret.png", "C:/secret.png"])
@pytest.mark.parametrize("listing", ["captions.json", "meta.json"])
def test_an_entry_of_a_json_file_cannot_reach_out_of_its_folder(tmp_path: Path, name: str, listing: str):
    folder = pictures(tmp_path / "data", 1)
    (folder / "000.txt").unlink()
    picture(9).save(tmp_path / "secret.png")
    entry = (lambda text: {"caption": text}) if listing == "meta.json" else (lambda text: text)
    (folder / listing).write_text(json.dumps({"000.png": entry("good"), name: entry("a secret")}))
    with listening() as opened:
        found = items(folder)
    assert [name for name in opened if name.startswith(str(tmp_path))] == [str(folder / listing)]
    assert found.pop("000.png").caption == "good"
    assert [item.path for item in found.values()] == [None]


@pytest.mark.parametrize(("name", "caption"), [
    ("red_fox.png", "red fox"), ("red fox (3).png", "red fox"), ("red_fox-02.png", "red fox"), ("fox2.png", "fox2"),
    ("007.png", "007")])
def test_a_file_name_may_be_the_caption(tmp_path: Path, name: str, caption: str):
    picture(0).save(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("something else")
    assert [item.caption for item in read(tmp_path, caption_from="file_name").items] == [caption]


def test_only_caption_files_of_the_ending_asked_for_count(tmp_path: Path):
    pictures(tmp_path, 1)
    (tmp_path / "000.caption").write_text("the other")
    assert items(tmp_path, caption_extension=".caption")["000.png"].caption == "the other"
    assert skipped(tmp_path, caption_extension=".caption") == {"000.txt": "caption_extension is '.caption'"}


def test_words_around_captions_and_a_trigger_are_put_in(tmp_path: Path):
    pictures(tmp_path, 2)
    (tmp_path / "000.txt").write_text("a [trigger] blob")
    settings = {"trigger": "sks", "caption_prefix": "photo of", "caption_suffix": "on white"}
    assert [item.caption for item in read(tmp_path, **settings).items] == [
        "photo of a sks blob on white", "photo of sks blobs number 1 on white"]


def test_class_tokens_caption_what_has_no_caption_of_its_own(tmp_path: Path):
    pictures(tmp_path, 2)
    (tmp_path / "001.txt").unlink()
    assert [(item.caption, item.fallback) for item in read(tmp_path, class_tokens="a blob").items] == [
        ("blobs number 0", False), ("a blob", True)]


# names that collide, and what is skipped ------------------------------------------------------------------------------


def test_names_that_differ_in_case_or_unicode_form_are_different_names(tmp_path: Path):
    forms = [unicodedata.normalize(form, "naïve") for form in ("NFC", "NFD")]
    for seed, stem in enumerate([*forms, "fox", "FOX"]):
        picture(seed).save(tmp_path / f"{stem}.png")
        (tmp_path / f"{stem}.txt").write_text(f"caption {seed}")
    assert {item.caption for item in read(tmp_path).items} == {f"caption {seed}" for seed in range(4)}
    (tmp_path / "fox.txt").unlink()
    assert items(tmp_path)["fox.png"].problem is not None  # FOX.txt is another picture's


def test_every_file_that_is_no_picture_is_listed_with_the_reason(tmp_path: Path):
    folder = pictures(tmp_path / "data", 1)
    for name in ("000_0064x0064_sdxl.npz", "notes.doc", "gone.txt", ".hidden", "_latent_cache/x.png",
                 "000-masklabel.png", "old.zip"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "door").symlink_to(tmp_path)
    assert skipped(folder) == {
        "000_0064x0064_sdxl.npz": "another trainer's cache", "notes.doc": "no picture",
        "gone.txt": "no picture of this name", ".hidden": "hidden",
        "_latent_cache": "a folder of another program's cache",
        "000-masklabel.png": "another trainer's mask or condition",
        "old.zip": "an archive; unpack it", "door": "a link to a folder, which is not entered"}


def test_what_was_skipped_is_kept_with_the_snapshot(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 2)
    (folder / "000.npz").write_bytes(b"x")
    made = curate(bench, data(folder), CurationConfig(), dataset="blobs", training_size=64)
    rows = pq.read_table(pa.BufferReader(bench.store.read(made.outputs["skipped"].sha256))).to_pylist()
    assert rows == [{"source": str(folder), "file_name": "000.npz", "reason": "another trainer's cache"}]
    assert made.facts["sources"] == [
        {"path": str(folder), "layout": "folder", "pictures": 2, "skipped": {"another trainer's cache": 1}}]


# tars ---------------------------------------------------------------------------------------------------------------


def test_members_of_a_tar_that_reach_out_or_are_no_files_are_refused_one_by_one(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(write_tar(path, {"good.png": png(0), "good.txt": b"good", "../bad.png": png(1)}), "a") as archive:
        for name, kind, target in (("link.png", tarfile.SYMTYPE, "/etc/passwd"), ("hard.png", tarfile.LNKTYPE, "x"),
                                   ("pipe.png", tarfile.FIFOTYPE, "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    with listening() as opened:
        found = items(path)
    assert set(opened) == {str(path)}
    assert found.pop("a.tar/good.png").caption == "good"
    assert len(found) == 4 and all(item.path is None and item.problem for item in found.values())


def test_what_a_tar_holds_besides_is_listed(tmp_path: Path):
    members = {"0.png": png(0), "0.txt": b"a", "0.seg.png": png(1), "1.txt": b"b", "0.cls": b"1"}
    path = write_tar(tmp_path / "a.tar", members)
    assert skipped(path) == {
        "a.tar/0.seg.png": "neither a picture nor a caption by its ending after the first dot",
        "a.tar/0.cls": "neither a picture nor a caption by its ending after the first dot",
        "a.tar/1.txt": "no picture of this key"}


@pytest.mark.parametrize("harm", ["cut", "packed", "other"])
def test_a_tar_that_cannot_be_read_stops_with_one_line(tmp_path: Path, harm: str):
    path = write_tar(tmp_path / "a.tar", {"0.png": png(0) * 9, "0.txt": b"a"})
    body = path.read_bytes()
    if harm == "packed":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(__file__, "0.txt")
    else:
        path.write_bytes(body[:1000] if harm == "cut" else b"no tar" * 1000)
    with pytest.raises(BadInput, match=r"a\.tar: not a tar that can be read") as caught:
        read(path)
    assert "\n" not in str(caught.value)


# rows ---------------------------------------------------------------------------------------------------------------


def test_a_data_set_with_both_splits_says_them_and_one_with_a_single_split_says_none(tmp_path: Path):
    assert {item.split for item in read(as_parquet(tmp_path / "one")).items} == {None}
    DatasetDict({"train": dataset(), "test": dataset().select([0])}).save_to_disk(tmp_path / "two")
    assert Counter(item.split for item in read(tmp_path / "two").items) == {"train": NUMBER, "test": 1}


def test_a_row_without_bytes_or_caption_is_a_problem_of_that_row(tmp_path: Path):
    rows = [{"image": {"bytes": png(0), "path": None}, "text": "good"},
            {"image": {"bytes": None, "path": "/etc/passwd"}, "text": "elsewhere"},
            {"image": {"bytes": png(1), "path": "b.png"}, "text": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = items(tmp_path / "a.parquet")
    assert [(item.problem is None, item.path is None) for item in found.values()] == [
        (True, False), (False, True), (False, False)]
    assert "names its picture by a path" in str(found["a.parquet/0000001"].problem)


@pytest.mark.parametrize(("rows", "settings", "said"), [
    ([{"a": "x"}], {}, "no column holds pictures, there are a; name one with image_column"),
    ([{"image": b"x", "title": "x"}], {}, "none of text, caption, captions, prompt, only image, title"),
    ([{"image": b"x", "text": "x"}], {"caption_column": "txt"}, "no column 'txt', only image, text"),
    ([{"image": b"x", "text": "x"}], {"image_column": "jpg"}, "no column 'jpg', only image, text"),
])
def test_a_file_of_rows_without_the_columns_stops_with_one_line_naming_those_it_has(
    tmp_path: Path, rows: list[dict[str, object]], settings: dict[str, object], said: str
):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=said):
        read(tmp_path / "a.parquet", **settings)


def test_a_column_that_the_recipe_names_is_taken(tmp_path: Path):
    row = {"text": "a", "title": "b", "x": png(0), "y": png(1)}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (item,) = read(tmp_path / "a.parquet", caption_column="title", image_column="y").items
    assert (item.caption, item.member and item.member.sha256) == ("b", sha256_of_png(1))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_data_set_of_the_hub_is_read_from_its_cache_at_the_commit_that_the_recipe_pins(tmp_path: Path):
    """In the layout of the hub's cache, where a snapshot's files are links to blobs beside it."""
    repo = tmp_path / "datasets--someone--blobs"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    (snapshot / "data").mkdir(parents=True)
    dataset().to_parquet(repo / "blobs" / "abc")
    (snapshot / "data" / "train-00000-of-00001.parquet").symlink_to("../../../blobs/abc")
    (snapshot / "evil.parquet").symlink_to("/etc/passwd")
    code = (
        "import sys; from components.config import DataConfig; from components.curation.sources import read_data\n"
        "source = {'path': 'someone/blobs', 'revision': sys.argv[1]}\n"
        "data = DataConfig.model_validate({'sources': [source]})\n"
        "for item in read_data(data).items: print(item.caption, item.problem)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}

    def run(commit: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, commit], env=environment, capture_output=True, text=True,
                              timeout=60, check=False)

    done = run(COMMIT)
    assert done.stdout.splitlines()[:NUMBER] == [f"blobs number {i} None" for i in range(NUMBER)]
    assert "link to a file outside the folder" in done.stdout.splitlines()[NUMBER]
    assert "data set 'someone/blobs' at ffffffff: not in the local cache" in run("f" * 40).stderr


@pytest.mark.parametrize("name", ["../blobs", "someone", "a/../b", "https://host/x", "/etc/passwd", "a/b/c"])
def test_what_is_no_id_of_the_hub_is_never_asked_for(name: str):
    with pytest.raises(BadInput, match="no id of a data set"):
        read_data(data(name, revision=COMMIT))


# rescans ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["captions beside", "jsonl", "kohya", "webdataset", "parquet by datasets"])
def test_a_rescan_of_what_has_not_changed_costs_one_stat_per_file_and_opens_none(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
):
    path = WAYS[way][1](tmp_path / "data")
    monkeypatch.setattr("components.curation.memory.TRUSTED_AGE_NS", -(10**15))  # nothing is too young to be trusted
    first = scan(bench, data(path))
    files = {str(file) for file in path.rglob("*") if file.is_file()}
    stats: Counter[str] = Counter()
    stat = os.stat

    def counted(name: Any, *given: Any, **named: Any) -> os.stat_result:
        stats[str(name)] += 1
        return stat(name, *given, **named)

    monkeypatch.setattr(os, "stat", counted)
    with listening() as opened:
        second = scan(bench, data(path))
    assert (second.digest, second.hashed) == (first.digest, 0)
    assert [name for name in opened if name.startswith(str(path))] == []
    assert {name: stats[name] for name in files} == dict.fromkeys(files, 1)


def test_a_caption_that_is_edited_in_place_with_its_times_put_back_is_read_again(bench: Bench, tmp_path: Path):
    caption = pictures(tmp_path / "data", 1) / "000.txt"
    first = scan(bench, data(tmp_path / "data"))
    before = caption.stat()
    caption.write_text("blobs number 7\n")
    os.utime(caption, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = scan(bench, data(tmp_path / "data"))
    assert (first.files[0].item.caption, second.files[0].item.caption) == ("blobs number 0", "blobs number 7")


def test_a_member_that_is_changed_in_place_is_found_and_only_new_pictures_are_decoded(bench: Bench, tmp_path: Path):
    path = as_webdataset(tmp_path / "data")
    made = curate(bench, data(path), CurationConfig(), dataset="blobs", training_size=64)
    members = {"002.png": png(2), "002.txt": b"blobs number 2", "009.png": png(9), "009.txt": b"new"}
    write_tar(path / "00001.tar", members)
    again = curate(bench, data(path), CurationConfig(), dataset="blobs", training_size=64)
    assert (made.facts["examined"], again.facts["examined"]) == (NUMBER, 1)
    assert "new" in {row.text for row in read_manifest(bench.store, again.outputs["manifest"].sha256)}
