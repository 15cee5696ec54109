"""Folders as people have them: what becomes a sample, what becomes a verdict, what stops the run with one line."""

import csv
import json
import os
import time
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import DataSource
from components.curation.items import ending_of
from components.curation.sources import Item, hash_files, read_folder, read_sources
from components.errors import BadInput
from components.stages import Bench
from tests.curation.folders import picture, pictures, sources, table


def read(folder: Path, **settings: object) -> dict[str, Item]:
    return {item.file_name: item for item in read_folder(DataSource.model_validate({"path": str(folder)} | settings))}


def with_caption(folder: Path, data: bytes, suffix: str = ".txt") -> Path:
    """One good picture, and one whose caption file holds `data`."""
    pictures(folder, 1)
    picture(7).save(folder / "b.png")
    (folder / f"b{suffix}").write_bytes(data)
    return folder


@pytest.mark.parametrize(("suffix", "body"), [
    (".txt", "a cat\n"), (".caption", "\ufeff a  cat\r\n"), (".json", '{"caption": "a cat", "tags": []}'),
    (".json", '{"text": "a cat"}'), (".txt", "\n\na cat\nsecond line")])
def test_a_picture_takes_the_caption_of_the_same_stem(tmp_path: Path, suffix: str, body: str):
    assert read(with_caption(tmp_path, body.encode(), suffix))["b.png"].caption == "a cat"


def test_the_whole_caption_file_counts_when_asked_for(tmp_path: Path):
    assert read(with_caption(tmp_path, b"a cat\non a mat"), caption_lines="whole")["b.png"].caption == "a cat on a mat"


def test_two_captions_of_one_stem_are_an_error(tmp_path: Path):
    (with_caption(tmp_path, b"a cat") / "b.caption").write_text("a dog")
    with pytest.raises(BadInput, match=r"b\.png: has two captions, b\.caption and b\.txt"):
        read(tmp_path)


@pytest.mark.parametrize(("data", "offset"), [
    (b"caf\xe9", 3), ("cat".encode("utf-16"), 0), (b"it\x92s", 2), (b"a \xed\xa0\x80 b", 2)])
def test_a_caption_that_is_not_utf8_is_a_problem_naming_file_and_offset(tmp_path: Path, data: bytes, offset: int):
    problem = read(with_caption(tmp_path, data))["b.png"].problem
    assert problem is not None
    assert "b.txt" in problem.reason and f"offset {offset} " in problem.reason


@pytest.mark.parametrize("data", [b"", b" \n\t\n", b"\xef\xbb\xbf", b"\0"])
def test_an_empty_caption_is_a_problem_of_that_picture_only(tmp_path: Path, data: bytes):
    items = read(with_caption(tmp_path, data))
    assert items["b.png"].problem is not None and "empty" in items["b.png"].problem.reason
    assert items["000.png"].problem is None


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"caption": 3}', b'{"caption": "\\ud800"}', b"[" * 100_000])
def test_a_json_caption_without_text_is_a_problem(tmp_path: Path, data: bytes):
    assert read(with_caption(tmp_path, data, ".json"))["b.png"].problem is not None


def test_two_pictures_of_one_stem_are_two_samples(tmp_path: Path):
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("both")
    assert {name: item.caption for name, item in read(tmp_path).items()} == {"a.png": "both", "a.jpg": "both"}


def test_names_in_any_script_are_kept_as_they_are(tmp_path: Path):
    for seed, name in enumerate(names := ["naïve.png", "nai\u0308ve.png", "猫 🐈.png", "שלום.png", "a'b\"c;.png"]):
        picture(seed).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name, encoding="utf-8")
    assert {name: item.caption for name, item in read(tmp_path).items()} == {name: name for name in names}


# tables -------------------------------------------------------------------------------------------------------------

ROW = {"file_name": "000.png", "text": "a cat", "group": "cat", "split": "test", "licence": "CC0-1.0", "author": "A",
       "source": "B"}


def write_table(path: Path, row: dict[str, str]) -> None:
    match path.suffix:
        case ".jsonl":
            path.write_text(json.dumps(row) + "\n\n")
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, row.keys())
                writer.writeheader()
                writer.writerow(row)
        case _:
            pq.write_table(pa.Table.from_pylist([row]), path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_table_gives_caption_group_split_and_provenance(tmp_path: Path, suffix: str):
    write_table(pictures(tmp_path, 1) / f"metadata.{suffix}", ROW)
    item = read(tmp_path)["000.png"]
    assert (item.caption, item.group, item.split) == ("a cat", "cat", "test")
    assert (item.licence, item.author, item.source) == ("CC0-1.0", "A", "B")


def test_the_american_spelling_and_the_recipes_default_give_a_licence_too(tmp_path: Path):
    pictures(tmp_path, 2)
    table(tmp_path, [{"file_name": "000.png", "text": "a", "license": "MIT"}, {"file_name": "001.png", "text": "b"}])
    assert [item.licence for item in read(tmp_path, licence="CC0-1.0").values()] == ["MIT", "CC0-1.0"]


@pytest.mark.parametrize("name", [
    "../secret.png", "a/../../secret.png", "/etc/passwd.png", "..\\secret.png", "C:\\secret.png", "\\\\host\\x.png",
    "a\0.png", "%2e%2e/secret.png", "", "link.png", "door/secret.png"])
def test_a_table_cannot_reach_out_of_its_folder(tmp_path: Path, name: str):
    folder = pictures(tmp_path / "data", 1)
    picture(9).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "door").symlink_to(tmp_path)
    table(folder, [{"file_name": name, "text": "a secret"}])
    items = read(folder)
    assert items.pop("000.png").problem is None
    assert items and all(item.path is None and item.problem is not None for item in items.values())


@pytest.mark.parametrize(("body", "said"), [
    (b"{", "line 1 is not a JSON object"), (b"[1]", "line 1 is not a JSON object"),
    (b'{"file_name": "000.png", "title": "x"}', "line 1 has no 'text'"), (b"\xff", "offset 0 is not UTF-8"),
    (b'{"file_name": "000.png", "text": "x", "split": "both"}', "split is 'both', expected train or test"),
    (b'{"file_name": "000.png", "text": "x"}\n' * 2, "listed twice")])
def test_a_table_that_cannot_be_read_stops_with_one_line_saying_where(tmp_path: Path, body: bytes, said: str):
    (pictures(tmp_path, 1) / "metadata.jsonl").write_bytes(body)
    with pytest.raises(BadInput, match=said) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_parquet_table_that_is_none_stops_with_one_line(tmp_path: Path):
    (pictures(tmp_path, 1) / "metadata.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(BadInput, match="not a readable Parquet file"):
        read(tmp_path)


def test_two_tables_in_one_folder_are_an_error(tmp_path: Path):
    write_table(pictures(tmp_path, 1) / "metadata.jsonl", ROW)
    write_table(tmp_path / "metadata.csv", ROW)
    with pytest.raises(BadInput, match="two tables"):
        read(tmp_path)


def test_an_empty_cell_and_a_missing_picture_are_problems_of_their_rows(tmp_path: Path):
    pictures(tmp_path, 2)
    table(tmp_path, [{"file_name": "000.png", "text": None}, {"file_name": "gone.png", "text": "x"}])
    items = read(tmp_path)
    assert items["000.png"].problem is not None and items["gone.png"].problem is not None
    assert items["001.png"].caption == "blobs number 1"  # not in the table, but it has its own caption


# other trainers' trees ----------------------------------------------------------------------------------------------


def test_a_kohya_tree_gives_repeats_and_falls_back_to_class_tokens(tmp_path: Path):
    folder = tmp_path / "10_sks dog"
    pictures(folder, 2)
    (folder / "001.txt").unlink()
    items = read(tmp_path)
    assert {(item.repeats, item.caption, item.fallback) for item in items.values()} == {
        (10, "blobs number 0", False), (10, "sks dog", True)}


def test_caches_masks_and_hidden_files_are_no_pictures(tmp_path: Path):
    pictures(tmp_path, 1)
    for name in ("000-masklabel.png", "000-condlabel.png", ".hidden.png", "_latent_cache/x.png", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(3).save(tmp_path / name)
    (tmp_path / "000_0064x0064_sdxl.npz").write_bytes(b"x")
    assert list(read(tmp_path)) == ["000.png"]


def test_several_sources_keep_their_names_apart(tmp_path: Path):
    folders = [pictures(tmp_path / place / "cats", 1, first=i) for i, place in enumerate("ab")]
    assert [item.file_name for item in read_sources(sources(*folders))] == ["cats-2/001.png", "cats/000.png"]


# what is no folder of pictures --------------------------------------------------------------------------------------


def test_links_pipes_and_devices_are_named_and_not_opened(tmp_path: Path):
    folder = pictures(tmp_path / "data", 1)
    picture(9).save(tmp_path / "outside.png")
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    (folder / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (folder / "self.png").symlink_to("self.png")
    (folder / "inside.png").symlink_to("000.png")
    (folder / "inside.txt").write_text("a link within the folder")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    items = read(folder)
    assert items.keys() == {"000.png", "out.png", "nowhere.png", "self.png", "inside.png", "pipe.png"}
    assert {name for name, item in items.items() if item.path is not None} == {"000.png", "inside.png"}


@pytest.mark.parametrize(("make", "said"), [
    (lambda folder: None, "no such folder"),
    (lambda folder: folder.write_text("x"), "is a file, expected a folder"),
    (lambda folder: folder.mkdir(), "holds nothing"),
    (lambda folder: (folder.mkdir(), (folder / "a.doc").write_text("x")), "1 files but no pictures"),
    (lambda folder: (folder.mkdir(), picture(0).save(folder / "a.png")), "none of its 1 pictures has a caption"),
])
def test_a_folder_that_cannot_be_a_dataset_is_refused_in_one_line(tmp_path: Path, make, said: str):
    make(tmp_path / "data")
    with pytest.raises(BadInput, match=said) as caught:
        read(tmp_path / "data")
    assert "\n" not in str(caught.value)


# hashing ------------------------------------------------------------------------------------------------------------


def an_old_file(path: Path, bench: Bench) -> Path:
    """A file that was hashed long enough after its last change to be trusted."""
    path.write_bytes(b"one")
    hash_files(bench.catalog, [path])
    time.sleep(2.1)
    assert hash_files(bench.catalog, [path])[path].hashed
    assert not hash_files(bench.catalog, [path])[path].hashed
    return path


def test_an_unchanged_file_is_hashed_again_only_while_young_or_on_request(bench: Bench, tmp_path: Path):
    path = an_old_file(tmp_path / "a.png", bench)
    assert hash_files(bench.catalog, [path], verify=True)[path].hashed


def test_an_edit_with_size_and_mtime_put_back_is_noticed(bench: Bench, tmp_path: Path):
    path = an_old_file(tmp_path / "a.png", bench)
    before, old = path.stat(), hash_files(bench.catalog, [path])[path].sha256
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert hash_files(bench.catalog, [path])[path].sha256 != old


@pytest.mark.parametrize(
    "name", ["a.png", "a/b.tar.gz", "a.b/c", ".png", "a/.hidden.PNG", "a.", "a..png", "..png", "é.İ"]
)
def test_a_files_ending_is_what_pathlib_says(name: str):
    assert ending_of(name) == PurePosixPath(name).suffix
