"""What a recipe read yesterday it reads tomorrow: folders of every kind that existed keep the digests they had.

The digests were written down by the code before other layouts were read; a change of one costs every user a retraining.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config import DataConfig
from components.curation.scanning import scan
from components.stages import Bench

Source = dict[str, Any]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def of(folder: Path, files: dict[str, str], **settings: object) -> Source:
    return {"sources": [{"path": str(write(folder, files)), **settings}]}


def two(folder: Path, files: dict[str, str]) -> Source:
    paths = [write(folder / place / "cats", files) for place in "ab"]
    return {"sources": [{"path": str(path)} for path in paths]}


def rows(*values: dict[str, object]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


BESIDE = {"a.png": "A", "a.txt": "a cat\nof two lines", "b.jpg": "B", "b.caption": "a dog", "c/d.webp": "C",
          "c/d.json": '{"caption": "a fox"}', "none.png": "D", "a_latents.npz": "x", "notes.doc": "x"}
TABLE = {"a.png": "A", "b.png": "B", "b.txt": "beside", "metadata.jsonl": rows(
    {"file_name": "a.png", "text": "listed", "group": "g", "split": "test", "licence": "CC0-1.0", "author": "me"},
    {"file_name": "../c.png", "text": "outside"}, {"file_name": "gone.png", "text": "gone"})}
KOHYA = {"10_sks dog/a.png": "A", "10_sks dog/a.txt": "a dog", "10_sks dog/b.png": "B", "2_cat/c.png": "C"}
FOLDERS: dict[str, Callable[[Path], Source]] = {
    "captions beside": lambda folder: of(folder, BESIDE, licence="MIT"),
    "a table": lambda folder: of(folder, TABLE),
    "a csv": lambda folder: of(folder, {"a.png": "A", "metadata.csv": "file_name,text\na.png,a cat\n"}),
    "a kohya tree": lambda folder: of(folder, KOHYA),
    "pictures and folders with repeats": lambda folder: of(folder, {"x.png": "X", "x.txt": "x"} | KOHYA),
    "variants": lambda folder: of(folder, BESIDE, caption_lines="variants"),
    "masks": lambda folder: of(folder, BESIDE | {"a-masklabel.png": "M"}, masks="masklabel"),
    "two sources": lambda folder: two(folder, BESIDE),
}

DIGESTS = {
    "captions beside": "e63d3e73afdbf47b887da22548aa40b7d30b012c619147078060b62c567f539d",
    "a table": "85511260dd762a148ffb5c5ba6d9b0225d7b75c9eed471dfddfa0538363af84c",
    "a csv": "08458469f0597709c4ce03d6edc027ae7bfe22ef5ee8147db4b66857ddd4d386",
    "a kohya tree": "5bcccee69a64063b395e9d304913bf3d4f48dad5656f2bc0165638c5f020df46",
    "pictures and folders with repeats": "72e92f66da78bba28603fde0f893f6e4f34a421c07ca02ebb17b80c5d472217a",
    "variants": "cf6a7ae2bd9f7d493a2716fada40ca5ac11478049e59e983b603cdf445f299a3",
    "masks": "865ae0caf72460792c5cc55e983003f659da6399e4309b7a8be5f1520df4562b",
    "two sources": "f15d73f736d046d06ebd045e4d3e1da2f66d8968adc0ebea56e4a71a41c9c003",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_it_always_was(bench: Bench, tmp_path: Path, name: str):
    assert scan(bench, DataConfig.model_validate(FOLDERS[name](tmp_path / "data"))).digest == DIGESTS[name]
