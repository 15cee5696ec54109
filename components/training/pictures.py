"""The captioned drawings that the embedded base is pre-trained on, as they come out of an image folder."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from components.errors import BadInput


@dataclass(frozen=True, slots=True)
class Picture:
    """One row of the folder's metadata.jsonl: what a caption can be made of."""

    file_name: str
    name: str
    synonyms: tuple[str, ...]
    style: str
    color: str | None
    concrete: bool
    group: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures and their pixels, (N, 3, H, W) uint8, in the order of the metadata."""

    rows: tuple[Picture, ...]
    pixels: Tensor

    def where(self, keep: Iterable[bool]) -> "Pictures":
        """The pictures whose flag is true."""
        index = [i for i, kept in enumerate(keep) if kept]
        return Pictures(tuple(self.rows[i] for i in index), self.pixels[index])

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(row.file_name for row in self.rows)


def read_pictures(folder: Path) -> Pictures:
    """All pictures of a folder written by `components.demo.emoji`. Raises: BadInput when it holds none."""
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise BadInput(f"{metadata}: not found; write the folder with components.demo.emoji.write_image_folder first")
    rows = []
    for line in metadata.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        synonyms = tuple(row.pop("synonyms"))
        rows.append(Picture(synonyms=synonyms, **{k: row[k] for k in Picture.__slots__ if k in row}))
    pixels = np.stack([np.asarray(Image.open(folder / row.file_name).convert("RGB")) for row in rows])
    return Pictures(tuple(rows), torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: splits that never move when data is added."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") / 2**64
