"""The one way from an image file's bytes to pixels: upright 8-bit sRGB. Checks, caching and metrics all decode here.

| in the file | becomes |
| --- | --- |
| EXIF orientation (8 cases) | upright; orientation, GPS and every other tag stay behind |
| ICC profile | converted to sRGB; a profile that is damaged or of another colour space is ignored, and that is noted |
| alpha or a transparent colour | laid on the background colour |
| palette, grey, 1 bit, YCbCr | RGB |
| CMYK | RGB through its profile, else by Pillow's plain formula |
| 16 bits per channel | the upper 8 bits |
| several frames or pages | the first one |
| floating point, SVG, EPS, PSD and anything not in `FORMATS` | refused |
"""

import hashlib
import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, UnidentifiedImageError

from components.errors import BadInput

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")   # no decoder outside this list is ever started
MAX_PIXELS = 64_000_000     # refused from the header; decoding and checking the largest takes below 1 GB of memory
STRIP_ROWS = 512            # hashed at a time
WHITE = (255, 255, 255)

warnings.filterwarnings("ignore", module=r"PIL\.")   # what Pillow says of odd files is said in notes and reasons

_UPRIGHT = {   # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_COLOUR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}   # Pillow mode -> the profile's own name for it


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
            notes = _header_notes(image)
            _require_rows(image)
            image.load()
            turn, metadata_notes = _metadata(image)
            pixels, pixel_notes = _to_rgb(image, background)
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
    """sha256 of an RGB image's size and pixels, hex: equal for the same picture in another container."""
    digest = hashlib.sha256(f"{image.width}x{image.height} RGB\n".encode())
    for top in range(0, image.height, STRIP_ROWS):
        digest.update(image.crop((0, top, image.width, min(top + STRIP_ROWS, image.height))).tobytes())
    return digest.hexdigest()


def _require_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UnreadableImage(f"its header says {image.width} x {image.height} pixels, more than {max_pixels:,}; "
                              "scale it down to use it")
    if image.width < 1 or image.height < 1:
        raise UnreadableImage(f"its header says {image.width} x {image.height} pixels")


def _require_rows(image: Image.Image) -> None:
    """Pillow leaves rows black that a TIFF's header promises and no strip holds; every other decoder says so."""
    tiles = getattr(image, "tile", ())
    if image.format == "TIFF" and max((tile.extents[3] for tile in tiles), default=0) < image.height:
        raise UnreadableImage(f"cut short or damaged: its header says {image.height} rows, its strips hold fewer")


def _header_notes(image: Image.Image) -> list[str]:
    notes = []
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append("multipage" if image.format == "TIFF" else "animated")
    if image.format in ("PNG", "TIFF") and (image.mode.startswith("I") or "16" in str(getattr(image, "tile", ""))):
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


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, list[str]]:
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no agreed range; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        upper = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB"), []
    notes = [note for mode, note in (("P", "palette"), ("PA", "palette"), ("CMYK", "cmyk")) if image.mode == mode]
    alpha = None
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = rgba.getchannel("A")
        colours = rgba.convert("RGB")
    else:
        colours = image.copy() if image.mode in _COLOUR_SPACES else image.convert("RGB")
    rgb, profile_notes = _to_srgb(colours, image.info.get("icc_profile"))
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb, notes + profile_notes
    rgb.paste(background, (0, 0, *rgb.size), mask=ImageChops.invert(alpha))   # the background, where it shines through
    return rgb, [*notes, *profile_notes, "transparent"]


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
