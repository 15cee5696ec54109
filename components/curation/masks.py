"""Masks that say where a picture counts in the loss: white trains, black does not, grey weighs.

They are read as users have them: OneTrainer's `x-masklabel.png` beside `x.png`, a folder of masks with the pictures'
names (kohya's `conditioning_data_dir`, diffusion-pipe's `mask_path`), or the picture's own alpha channel. Of a file
the red channel counts. A mask is kept as a grey PNG, so that it is known by its pixels.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from PIL import Image, ImageChops

from components.config import DataSource
from components.curation.items import Item, Problem, printable
from components.curation.pixels import WHITE, decode
from components.curation.readers.walking import Entry, Listing, list_source
from components.errors import BadInput

BESIDE, ALPHA = "masklabel", "alpha"  # of DataSource.masks; anything else is a folder
ENDING = "-masklabel.png"  # in place of the picture's
BLACK = (0, 0, 0)


def mask_folder(source: DataSource) -> Path | None:
    """The folder that holds a source's masks, resolved; None when they lie elsewhere or there are none."""
    return None if source.masks in (None, BESIDE, ALPHA) else Path(source.masks).resolve()


def masks_of(source: DataSource, listing: Listing, folder: Path | None) -> dict[str, list[Entry]]:
    """The files that may hold masks by the names of their pictures without the ending; `folder` is `mask_folder`'s.

    Like every file of a source they are regular files and lie inside, or have a problem.
    """
    if folder is None:
        beside = [entry for entry in listing.files if entry.file_name.endswith(ENDING)]
        found = [(entry.file_name.removesuffix(ENDING), entry) for entry in beside]
    else:
        found = [(str(entry.name.with_suffix("")), entry) for entry in list_source(folder, folder).files]
    masks: dict[str, list[Entry]] = {}
    for name, entry in found:
        masks.setdefault(name, []).append(entry)
    return masks


def with_mask(item: Item, source: DataSource, masks: Mapping[str, Sequence[Entry]]) -> Item:
    """The item with the file that holds its mask, if it has one, or with what is wrong with that file."""
    if item.location is None:
        return item
    if source.masks == ALPHA:
        return replace(item, mask=item.location)
    found = masks.get(str(PurePosixPath(item.file_name).with_suffix("")), ())
    reasons = [f"{entry.name}: {entry.problem.reason}" for entry in found if entry.problem]
    if len(found) > 1:
        reasons.append(f"it has two masks, {found[0].name} and {found[1].name}; remove one")
    if reasons:
        return replace(item, problem=item.problem or Problem("mask", printable(reasons[0])))
    return replace(item, mask=found[0].location) if found else item


def read_mask(data: bytes, *, alpha: bool) -> Image.Image:
    """The mask in a file's bytes as a grey image, upright; `alpha`: how opaque a picture is.

    Laid on white and on black a picture differs by what shines through. Raises UnreadableImage.
    """
    if not alpha:
        return decode(data).getchannel("R")
    through = ImageChops.subtract(decode(data, WHITE).getchannel("R"), decode(data, BLACK).getchannel("R"))
    return ImageChops.invert(through)


def require_use(mask: Image.Image, width: int, height: int) -> None:
    """Raises BadInput, without the file's name, for a mask of another size and for one that leaves nothing."""
    if mask.size != (width, height):
        raise BadInput(f"it is {mask.width}x{mask.height}, its picture {width}x{height}; give it the picture's size")
    if mask.getextrema() == (0, 0):
        raise BadInput("it is black all over, so nothing would be learnt; remove the picture or paint what counts")


def mask_png(mask: Image.Image) -> bytes:
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()
