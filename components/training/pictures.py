"""The captioned drawings that the embedded base is pre-trained on, as they come out of an image folder."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from components.errors import BadInput

TINTS = {  # the middle shade of a drawing in one colour, RGB in [0, 1], by the word that captions use
    "red": (0.86, 0.16, 0.18),
    "orange": (0.96, 0.55, 0.11),
    "yellow": (0.97, 0.80, 0.16),
    "green": (0.22, 0.64, 0.28),
    "blue": (0.15, 0.42, 0.87),
    "purple": (0.50, 0.25, 0.74),
    "pink": (0.95, 0.45, 0.70),
}


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


def in_color(picture: Picture, color: str) -> Picture:
    """What captions say of the drawing after `tinted`; a name that has a colour already stays as it is."""
    if not TINTS.keys().isdisjoint(picture.name.split()):
        return picture
    return replace(picture, name=f"{color} {picture.name}", synonyms=(), color=None)


def tinted(pixels: Tensor, color: str) -> Tensor:
    """The drawings (N, 3, H, W) uint8 in shades of one colour, from a dark one over `TINTS` to white.

    A pixel's shade follows its brightness and saturation, so that white paper stays white and yellow becomes no paler
    than blue.
    """
    unit = pixels.float() / 255
    low, high = unit.amin(1, keepdim=True), unit.amax(1, keepdim=True)
    luminance = (unit * unit.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)
    depth = torch.maximum(1 - luminance, 0.6 * (high - low) / high.clamp_min(1e-6))  # 0 on paper, 1 in black
    middle = unit.new_tensor(TINTS[color]).view(3, 1, 1)
    light, dark = (depth / 0.5).clamp(max=1), ((depth - 0.5) / 0.5).clamp(min=0)
    return ((1 - light + light * middle) * (1 - 0.7 * dark) * 255).round().to(torch.uint8)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: splits that never move when data is added."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") / 2**64
