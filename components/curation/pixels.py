"""The one way from an image file's bytes to pixels: upright 8-bit sRGB. Checks, caching and metrics all decode here.

| in the file | becomes |
| --- | --- |
| EXIF orientation (8 cases) | upright; orientation, GPS and every other tag stay behind |
| ICC profile | converted to sRGB; a profile that is damaged or of another colour space is ignored, and that is noted |
| alpha or a transparent colour | laid on the background colour |
| palette, grey, 1 bit, YCbCr | RGB |
| CMYK | RGB through its profile, else by Pillow's plain formula |
| 16 bits per channel | the upper 8 bits, of 12 bits as well; a transparent colour of 16 bits is not looked for |
| 32-bit whole numbers | like 16 bits; refused where one needs more |
| L*a*b*, premultiplied alpha, 0 for white | RGB as anybody sees it |
| several frames or pages | the first one |
| floating point, SVG, EPS, PSD and anything not in `FORMATS` | refused |
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from io import BytesIO
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageCms, UnidentifiedImageError

from components.errors import BadInput

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")   # no decoder outside this list is ever started
MAX_PIXELS = 64_000_000     # refused from the header; decoding and checking the largest takes below 1 GB of memory
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS   # of a JPEG, over all its scans; encoders make about ten
MAX_TILE_PIXELS = 2048 * 2048   # of a TIFF, where the picture itself is smaller: a tile is unpacked as a whole
STRIP_PIXELS = 2**20        # hashed at a time
WHITE = (255, 255, 255)

warnings.filterwarnings("ignore", module=r"PIL\.")   # what Pillow says of odd files is said in notes and reasons

_UPRIGHT = {   # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")   # of a JPEG, those left out that stand within a scan
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_WHITE_IS_ZERO = 0   # a TIFF's grey; Pillow turns it around with 8 bits and fewer
_COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}   # Pillow mode -> the profile's own name for it


class _TiffTag(IntEnum):
    """Of the TIFF 6.0 specification."""

    ROWS = 257
    MEANING = 262   # PhotometricInterpretation
    TILE_WIDTH = 322
    TILE_HEIGHT = 323


class UnreadableImage(BadInput):
    """These bytes are no image that may be opened; the message is one line without the file's name."""


@dataclass(frozen=True, slots=True)
class Decoded:
    image: Image.Image        # mode RGB, upright, without metadata
    format: str               # "PNG", "JPEG", ...
    mode: str                 # Pillow mode of the stored pixels, such as "P" or "I;16"
    notes: tuple[str, ...]    # what was done to the pixels or left behind: keys of NOTES


NOTES = {
    "rotated": "turned upright as its EXIF orientation says",
    "gps": "holds GPS coordinates, which are not carried on",
    "metadata_damaged": "its EXIF data cannot be read and is ignored",
    "transparent": "transparent pixels laid on the background colour",
    "palette": "palette colours turned into RGB",
    "cmyk": "CMYK turned into RGB",
    "16bit": "16 bits per channel cut to 8",
    "profile": "colours converted from its own profile to sRGB",
    "profile_ignored": "its colour profile cannot be used and is ignored",
    "animated": "only the first frame is used",
    "multipage": "only the first page is used",
}


def decode(data: bytes, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """The picture in `data` as an upright RGB image. Raises UnreadableImage with a one-line reason."""
    return read_image(data, background).image


def read_image(data: bytes, background: tuple[int, int, int] = WHITE, *, max_pixels: int = MAX_PIXELS) -> Decoded:
    """`decode`, with what the file was. The header alone decides whether the pixels are decoded at all.

    Raises UnreadableImage: empty, not an image of `FORMATS`, above `max_pixels`, cut short, or damaged.
    """
    if not data:
        raise UnreadableImage("the file is empty (0 bytes)")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _require_size(image, max_pixels)
            stored = _stored_as(image)
            notes = _header_notes(image, stored)
            _require_rows_and_tiles(image)
            _require_few_scans(image, data)
            image.load()
            turn, metadata_notes = _metadata(image)
            pixels, pixel_notes = _to_rgb(image, stored, background)
            upright = pixels.transpose(turn) if turn is not None else pixels
            upright.info.clear()
            stored_as = "JPEG" if image.format == "MPO" else str(image.format)   # MPO: a camera's JPEG with a preview
            return Decoded(upright, stored_as, image.mode, (*metadata_notes, *notes, *pixel_notes))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"not a {', '.join(FORMATS)} image; the file begins with {data[:12]!r}") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(_one_line(error)) from None
    except Exception as error:  # a damaged file makes a decoder raise almost anything
        raise UnreadableImage(f"cut short or damaged: {_one_line(error)}") from None


def rgb_digest(image: Image.Image) -> str:
    """BLAKE3 of an RGB image's size and pixels, 64 hex digits: equal for the same picture in another container.

    There are thirty times as many bytes of pixels as of the file, and BLAKE3 takes half of sha256's time for them.
    """
    digest = blake3(f"{image.width}x{image.height} RGB\n".encode())
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))) if rows < image.height else image
        digest.update(strip.tobytes())
    return digest.hexdigest()


def _require_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UnreadableImage(f"its header says {image.width} x {image.height} pixels, more than {max_pixels:,}; "
                              "scale it down to use it")
    if image.width < 1 or image.height < 1:
        raise UnreadableImage(f"its header says {image.width} x {image.height} pixels")


def _require_rows_and_tiles(image: Image.Image) -> None:
    """Of a TIFF. Pillow leaves rows black that its header promises and no strip holds, and it makes room for a whole
    tile, however little of that is in the picture."""
    if image.format != "TIFF":
        return
    tags, tiles = _tags(image), getattr(image, "tile", ())
    rows = tags[_TiffTag.ROWS]   # as they are stored: Pillow turns the picture's size already
    if max((tile.extents[3] for tile in tiles), default=0) < rows:
        raise UnreadableImage(f"cut short or damaged: its header says {rows} rows, its strips hold fewer")
    width, height = tags.get(_TiffTag.TILE_WIDTH, 0), tags.get(_TiffTag.TILE_HEIGHT, 0)
    if width * height > max(MAX_TILE_PIXELS, (image.width + 16) * (image.height + 16)):
        raise UnreadableImage(f"its header says tiles of {width} x {height} pixels for {image.width} x {image.height}; "
                              "save it anew to use it")


def _require_few_scans(image: Image.Image, data: bytes) -> None:
    """A progressive JPEG is gone over once for each scan, of which a few bytes are enough."""
    if image.format not in ("JPEG", "MPO"):
        return
    at, scans = 0, 0
    while (marker := _MARKER.search(data, at)) and marker[0] != _END_OF_IMAGE:
        scans += marker[0] == _START_OF_SCAN
        at = marker.end() + (0 if marker[0] == _START_OF_IMAGE else int.from_bytes(data[marker.end():marker.end() + 2]))
    if scans * image.width * image.height > MAX_SCANNED_PIXELS:
        raise UnreadableImage(f"it goes {scans} times over {image.width} x {image.height} pixels; "
                              "save it anew to use it")


def _stored_as(image: Image.Image) -> str:
    """Pillow's name for how the samples lie in the file, such as "RGB;16B"; to be asked for before they are loaded."""
    arguments = next((tile.args for tile in getattr(image, "tile", ())), "")
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _tags(image: Image.Image) -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {})


def _header_notes(image: Image.Image, stored: str) -> list[str]:
    notes = []
    if image.format == "TIFF" and _tags(image).get(ExifTags.Base.Orientation) in _UPRIGHT:
        notes.append("rotated")   # by Pillow, as it loads
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append("multipage" if image.format == "TIFF" else "animated")
    if image.format in ("PNG", "TIFF") and (image.mode.startswith("I") or ";16" in stored):
        notes.append("16bit")
    return notes


def _metadata(image: Image.Image) -> tuple[Image.Transpose | None, list[str]]:
    try:
        exif = image.getexif()
        turn = _UPRIGHT.get(exif.get(ExifTags.Base.Orientation, 1))
        notes = ["rotated"] if turn is not None else []
        if exif.get_ifd(ExifTags.IFD.GPSInfo):
            notes.append("gps")
    except Exception:  # damaged metadata does not spoil the pixels
        return None, ["metadata_damaged"]
    return turn, notes


def _to_rgb(image: Image.Image, stored: str, background: tuple[int, int, int]) -> tuple[Image.Image, list[str]]:
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no agreed range; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        return Image.fromarray(_upper_bits(image, stored)).convert("RGB"), []
    if image.mode == "La":
        image = image.convert("LA")
    notes = [note for mode, note in (("P", "palette"), ("PA", "palette"), ("CMYK", "cmyk")) if image.mode == mode]
    alpha = None
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = rgba.getchannel("A")
        colours = rgba.convert("RGB")
    else:
        own = image.mode in _COLOUR_SPACES   # the decoded pixels themselves: a copy costs half as much as decoding
        colours = image._new(image.im) if own else image.convert("RGB")
    rgb, profile_notes = _to_srgb(colours, image.info.get("icc_profile"))
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb, notes + profile_notes
    rgb.paste(background, (0, 0, *rgb.size), mask=ImageChops.invert(alpha))   # the background, where it shines through
    return rgb, [*notes, *profile_notes, "transparent"]


def _upper_bits(image: Image.Image, stored: str) -> NDArray[np.uint8]:
    """The upper 8 bits of grey whole numbers. Raises UnreadableImage where one has more than 16 bits."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("whole numbers below 0 or beyond 16 bits have no agreed range; save it with 8 or 16 bits "
                              "per channel")
    upper = (values >> (4 if stored.startswith("I;12") else 8)).astype(np.uint8)
    return ~upper if _tags(image).get(_TiffTag.MEANING) == _WHITE_IS_ZERO else upper


def _to_srgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, list[str]]:
    """An RGB, L or CMYK image in sRGB; the same object when nothing needs to change."""
    if icc:
        try:
            profile = ImageCms.ImageCmsProfile(BytesIO(icc))
            if "sRGB" in ImageCms.getProfileDescription(profile):
                return _plain(image), []
            if _colour_space(profile) == _COLOUR_SPACES[image.mode]:
                srgb = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
                if converted is not None:
                    return converted, ["profile"]
        except Exception:  # a profile is advice: without it the numbers are taken as sRGB
            pass
        return _plain(image), ["profile_ignored"]
    return _plain(image), []


def _colour_space(profile: ImageCms.ImageCmsProfile) -> str:
    return profile.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]  # stub: a file


def _plain(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
