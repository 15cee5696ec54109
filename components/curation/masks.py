"""Masks that say where a picture counts in the loss: white trains, black does not, grey weighs.

They are read as users have them: OneTrainer's `x-masklabel.png` beside `x.png`, a folder of masks with the pictures'
names (kohya's `conditioning_data_dir`, diffusion-pipe's `mask_path`), or the picture's own alpha channel. Of a file
the red channel counts. A mask is kept as a grey PNG, so that it is known by its pixels.
"""

import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from PIL import Image, ImageChops

from components.config import DataSource
from components.curation.pixels import WHITE, decode
from components.errors import BadInput

BESIDE, ALPHA = "masklabel", "alpha"  # of DataSource.masks; anything else is a folder
BLACK = (0, 0, 0)


def mask_folder(source: DataSource) -> Path | None:
    """The folder that holds a source's masks, resolved; None when they lie elsewhere or there are none."""
    return None if source.masks in (None, BESIDE, ALPHA) else Path(source.masks).resolve()


def mask_path(source: DataSource, picture: Path, name: str, folder: Mapping[str, Path]) -> Path | None:
    """The file that holds the mask of `picture`, called `name` in its source; `folder` is what `masks_in` found."""
    if source.masks == ALPHA:
        return picture
    if source.masks == BESIDE:
        beside = picture.with_name(f"{picture.stem}-masklabel.png")
        return beside if beside.is_file() else None
    return folder.get(str(PurePosixPath(name).with_suffix("")))


def masks_in(folder: Path) -> dict[str, Path]:
    """The files of a folder of masks by their name without the ending, which may be another than the picture's."""
    return {
        str(PurePosixPath(path.relative_to(folder)).with_suffix("")): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
