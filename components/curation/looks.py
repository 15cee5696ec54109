"""What a drawn picture looks like at a second glance, from one more decode that is never repeated.

Facts of `checks.examine` tell photographs from drawings; kinds of drawings, and drawings that share a style's ground
and border, need a closer look, which photographs are spared.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.curation.measured import Figures, known_figures, remember_figures
from components.curation.pixels import decode
from components.stages import Bench

LOOK = "look:1"
COPY_SIDE = 16            # px, of the brightness copies that drawings are compared by
MOST_COLOURS = 256        # counted
LOOKED_AT_SIDE = 512      # px, of the middle of the picture; a pixel grid shows in any part
GRIDS = range(12, 1, -1)  # px, sides of the blocks that scaled-up pixel art is made of
GRID_SHARE = 0.9          # of all change between neighbours that falls on a grid's lines; elsewhere 1 / side does
CHUNK = 64                # pictures per commit


@dataclass(frozen=True, slots=True)
class Look:
    colours: int                       # distinct ones, at most MOST_COLOURS
    grid: int                          # px, side of the blocks it is made of; 1: none
    copy: NDArray[np.float64]          # (16, 16) brightness, mean 0 and deviation 1


def looks_of(bench: Bench, pictures: Mapping[str, str]) -> dict[str, Look]:
    """The look of each picture, by the digest of its pixels; `pictures` names the stored bytes of each."""
    figures = known_figures(bench.catalog, LOOK, pictures)
    missing = [digest for digest in pictures if digest not in figures]
    for start in range(0, len(missing), CHUNK):
        fresh = {digest: _figures(bench.store.read(pictures[digest])) for digest in missing[start:start + CHUNK]}
        remember_figures(bench.catalog, LOOK, fresh)
        figures |= fresh
    return {digest: Look(int(found[0]), int(found[1]), found[2:].reshape(COPY_SIDE, COPY_SIDE))
            for digest, found in figures.items()}


def alike(a: Look, b: Look) -> float:
    """Correlation of two pictures' reduced brightness, -1 to 1."""
    return float((a.copy * b.copy).mean())


def look_at(image: Image.Image) -> Look:
    """One RGB picture's look."""
    middle = _middle(image)
    colours = middle.getcolors(MOST_COLOURS)
    copy = np.asarray(image.convert("L").resize((COPY_SIDE, COPY_SIDE), Image.Resampling.BOX), dtype=np.float64)
    standard = (copy - copy.mean()) / max(float(copy.std()), 1e-9)
    return Look(MOST_COLOURS if colours is None else len(colours), _grid(middle), standard)


def _figures(data: bytes) -> Figures:
    look = look_at(decode(data))
    return np.concatenate([[look.colours, look.grid], look.copy.ravel()])


def _middle(image: Image.Image) -> Image.Image:
    width, height = min(image.width, LOOKED_AT_SIDE), min(image.height, LOOKED_AT_SIDE)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _grid(image: Image.Image) -> int:
    """The largest side of blocks on whose borders nearly all change lies, in both directions, or 1."""
    pixels = np.asarray(image.convert("L"), dtype=np.int16)
    changes = [np.abs(np.diff(pixels, axis=axis)).sum(axis=1 - axis) for axis in (0, 1)]   # (h - 1,), (w - 1,)
    for side in GRIDS:
        if all(len(change) >= 4 * side and _share_on_lines(change, side) >= GRID_SHARE for change in changes):
            return side
    return 1


def _share_on_lines(change: NDArray[np.int64], side: int) -> float:
    """The largest share of all change that lies `side` apart, wherever the first line is; 0 where nothing changes."""
    on_lines = np.bincount(np.arange(len(change)) % side, weights=change)
    return float(on_lines.max() / max(on_lines.sum(), 1))
