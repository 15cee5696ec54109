"""Folders of small pictures, no two alike unless a test says so, and benches to curate them on."""

import json
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from components.catalog.models import Base
from components.config import CurationConfig, DataConfig, DataSource
from components.curation.memory import TRUSTED_AGE_NS
from components.curation.snapshots import curate
from components.stages import Bench, Product
from components.workspace import Workspace


def new_bench(home: Path) -> Bench:
    bench = Bench.open(Workspace(home))
    Base.metadata.create_all(bench.catalog.engine)
    return bench


def picture(seed: int, side: int = 64) -> Image.Image:
    """Random soft blobs: every seed gives other hashes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def pictures(folder: Path, number: int, *, first: int = 0) -> Path:
    """`number` pictures with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + number):
        picture(seed).save(folder / f"{seed:03}.png")
        (folder / f"{seed:03}.txt").write_text(f"blobs number {seed}\n")
    return folder


def settle() -> None:
    """Wait until files that were just written are old enough for a scan to trust their times."""
    time.sleep(TRUSTED_AGE_NS / 1e9 + 0.5)


def table(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sources(*folders: Path) -> DataConfig:
    return DataConfig(sources=tuple(DataSource(path=str(folder)) for folder in folders))


def curated(bench: Bench, folder: Path, *, dataset: str = "blobs", **settings: object) -> Product:
    return curate(bench, sources(folder), CurationConfig.model_validate(settings), dataset=dataset, training_size=64)


def tree_digest(folder: Path) -> str:
    """Names, contents and times of every regular file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    rows = [f"{path}\0{sha256(path.read_bytes()).hexdigest()}\0{path.stat().st_mtime_ns}" for path in files]
    return sha256("\n".join(rows).encode()).hexdigest()


def mixed_folder(folder: Path) -> Path:
    """Thirty pictures, of which one is damaged and one is another's copy."""
    pictures(folder, 30)
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:100])
    (folder / "copy.png").write_bytes((folder / "003.png").read_bytes())
    (folder / "copy.txt").write_text("again")
    return folder
