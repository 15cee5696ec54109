"""Damaged, hostile and unusual picture files: one rule each, a line for what is refused, in little time and memory."""

import functools
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.curation.checks import ImageFacts, Unreadable, examine
from components.curation.pixels import FORMATS, UnreadableImage, decode, read_image, rgb_digest
from tests.curation.handmade import bmp_header, gif, jpeg_header, png, tiff, tiff_pages, webp_canvas
from tests.curation.test_pixels import encoded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::DeprecationWarning:PIL")

noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
ROOT = Path(__file__).parents[2]

# damage ---------------------------------------------------------------------------------------------------------------

FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "blue")]}
CONTAINERS: dict[str, tuple[str, str, dict[str, object]]] = {  # Pillow's format, mode, how to save
    "PNG": ("PNG", "RGB", {}),
    "PNG, palette": ("PNG", "P", {}),
    "APNG": ("PNG", "RGB", FRAMES),
    "JPEG": ("JPEG", "RGB", {}),
    "JPEG, progressive": ("JPEG", "RGB", {"progressive": True}),
    "JPEG, CMYK": ("JPEG", "CMYK", {}),
    "WebP": ("WEBP", "RGB", {}),
    "WebP, lossless": ("WEBP", "RGBA", {"lossless": True}),
    "WebP, animated": ("WEBP", "RGB", FRAMES),
    "GIF": ("GIF", "P", {}),
    "GIF, animated": ("GIF", "P", FRAMES),
    "BMP": ("BMP", "RGB", {}),
    "TIFF": ("TIFF", "RGB", {}),
    "TIFF, LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "TIFF, deflate": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    "TIFF, JPEG": ("TIFF", "RGB", {"compression": "jpeg"}),
}
STILL = [name for name, (*_, options) in CONTAINERS.items() if options is not FRAMES]


@functools.cache
def whole(container: str) -> bytes:
    form, mode, options = CONTAINERS[container]
    return encoded(Image.fromarray(noise).convert(mode), form, **options)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("percent", [1, 10, 50, 90, 99])
def test_of_a_file_that_is_cut_short_no_half_picture_is_taken(container: str, percent: int):
    data = whole(container)
    found = examine(data[: len(data) * percent // 100])
    if isinstance(found, ImageFacts):  # what is missing came after the picture
        assert container not in STILL or percent == 99
        assert found.rgb_digest == rgb_digest(decode(data))
    else:
        assert "\n" not in found.reason and ("cut short or damaged" in found.reason or "not a PNG" in found.reason)


@pytest.mark.parametrize("container", CONTAINERS)
def test_whatever_bits_are_flipped_the_file_is_a_picture_or_is_refused(container: str):
    data, g = whole(container), np.random.default_rng(1)
    for trial in range(40):
        harmed = bytearray(data)
        for _ in range(1 + trial % 4):
            harmed[g.integers(0, len(data) if trial % 2 else 200)] ^= 1 << g.integers(0, 8)
        found = examine(bytes(harmed))
        assert isinstance(found, ImageFacts) or "\n" not in found.reason


# bombs ----------------------------------------------------------------------------------------------------------------


def progressive(scans: int) -> bytes:
    """A large and empty JPEG whose last scan comes again and again."""
    data = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def row(bits_per_pixel: int, width: int) -> bytes:
    return bytes(1 + width * bits_per_pixel // 8)


def bombs() -> dict[str, bytes]:
    """Small files that ask for much, by name; made when they are needed, since they take seconds."""
    zeros = zlib.compress(bytes(200 << 20), 1)
    return {
        "PNG, 65,000 squared": png(65_000, 65_000, 2, 8, b""),
        "PNG, the largest there is": png(2**31 - 1, 2**31 - 1, 2, 8, b""),
        "PNG, long and thin": png(2**31 - 1, 1, 0, 1, b""),
        "PNG, much more than its rows": png(64, 64, 2, 8, bytes(200 << 20)),
        "PNG, its profile": png(1, 1, 2, 8, row(24, 1), (b"iCCP", b"x\0\0" + zeros)),
        "PNG, its text": png(1, 1, 2, 8, row(24, 1), (b"zTXt", b"x\0\0" + zeros)),
        "PNG, its texts": png(1, 1, 2, 8, row(24, 1), *[(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_000_000)))] * 300),
        "PNG, its translated text": png(1, 1, 2, 8, row(24, 1), (b"iTXt", b"x\0\1\0\0\0" + zeros)),
        "APNG, frames that are said to be there": png(
            1, 1, 2, 8, row(24, 1), (b"acTL", struct.pack(">II", 2**31 - 1, 0))
        ),
        "WebP": webp_canvas(16_383, 16_383),
        "WebP, beyond the format": webp_canvas(2**24 - 1, 2**24 - 1),
        "BMP": bmp_header(30_000, 30_000),
        "GIF, its screen": gif(65_535, 65_535, [(1, 1)]),
        "GIF, its first frame": gif(1, 1, [(65_535, 65_535)]),
        "GIF, its second frame": gif(1, 1, [(1, 1), (65_535, 65_535)]),
        "GIF, many frames": gif(100, 100, [(1, 1)] * 100_000),
        "JPEG": jpeg_header(65_500, 65_500),
        "JPEG, many scans": progressive(500),
        "TIFF": tiff(65_535, 65_535, (8,), 1, b""),
        "TIFF, deflate": tiff(65_535, 65_535, (8,), 1, zlib.compress(bytes(1_000_000)), compression=8),
        "TIFF, one tile": tiff(64, 64, (8,) * 4, 2, zeros, compression=8, tile=(16_000, 16_000)),
        "TIFF, many pages in a ring": tiff_pages(20_000),
    }


MEASURED = """
import json, resource, sys, time
from pathlib import Path
from components.curation.checks import examine, ImageFacts
limit = 3 << 30  # of addresses, of which the libraries take the most
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
examine(Path(sys.argv[1], "warm").read_bytes())
for path in sorted(Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = examine(data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([path.name, time.process_time() - started, grown // 1024, getattr(found, "reason", "")]))
"""


def test_bombs_cost_less_than_a_second_and_little_memory_each(tmp_path: Path):
    (tmp_path / "warm").write_bytes(whole("PNG"))
    made = bombs()
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(made) + 1
    assert {name: (seconds, megabytes) for name, seconds, megabytes, _ in found if seconds > 1 or megabytes > 150} == {}
    harmless = {
        "warm",
        "APNG, frames that are said to be there",
        "GIF, its second frame",
        "GIF, many frames",
        "PNG, much more than its rows",
        "TIFF, many pages in a ring",
    }  # what comes first is a picture
    assert {name for name, *_, reason in found if not reason} == harmless


def test_a_progressive_jpeg_of_usual_making_is_read_and_its_scans_are_those_of_the_first_picture():
    large = Image.fromarray(noise).resize((1600, 1200))
    camera = (
        encoded(large, "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda\0\2" * 9000) + b"\xff\xda\0\2" * 99_000
    )
    assert read_image(camera).image.size == (1600, 1200)


# what else Pillow knows -----------------------------------------------------------------------------------------------


def written(form: str) -> bytes | None:
    """The format in whichever mode it can be written; None where it needs something that is not here."""
    for mode in ("RGB", "L", "1", "P", "RGBA", "F", "I;16"):
        try:
            return encoded(Image.fromarray(noise).resize((64, 64)).convert(mode), form)
        except Exception:
            continue
    return None


def test_every_other_format_that_pillow_writes_is_refused_by_name_of_those_that_are_read():
    Image.init()
    others = {form: data for form in Image.SAVE if form not in FORMATS and (data := written(form))}
    assert len(others) > 15
    del others["MPO"]  # a JPEG with more JPEGs behind it
    if "DIB" in others:  # a BMP without its first 14 bytes
        assert isinstance(examine(others["DIB"]), Unreadable)
    for form, data in others.items():
        found = examine(data)
        assert isinstance(found, Unreadable), form
        assert "not a PNG, JPEG, WEBP, GIF, BMP, TIFF image" in found.reason, form


# orientation ----------------------------------------------------------------------------------------------------------

UNDONE_BY = {  # orientation -> what was done to the upright picture
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
LOSSLESS = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}}


@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(64, 48), (48, 64)])
def test_a_turned_picture_is_upright_and_that_is_recorded(form: str, orientation: int, size: tuple[int, int]):
    upright = Image.fromarray(noise[::16, ::16]).resize(size, Image.Resampling.BICUBIC)
    stored = upright.transpose(UNDONE_BY[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = read_image(encoded(stored, form, exif=exif, **LOSSLESS[form]))
    assert decoded.image.size == size
    assert np.abs(np.asarray(decoded.image, dtype=int) - np.asarray(upright, dtype=int)).max() <= 8
    assert decoded.notes == (("rotated",) if orientation > 1 else ())


# pixels ---------------------------------------------------------------------------------------------------------------


def grey(*values: int, bits: int = 16) -> bytes:
    return struct.pack(f"<{len(values)}{'H' if bits == 16 else 'I'}", *values)


WHITE = (255, 255, 255)
GOLDEN: dict[str, tuple[bytes, tuple[int, int, int], tuple[str, ...]]] = {  # bytes, first pixel, notes
    "16-bit RGB TIFF": (tiff(1, 1, (16,) * 3, 2, grey(0x40FF, 0x80FF, 0xC0FF)), (0x40, 0x80, 0xC0), ("16bit",)),
    "16-bit CMYK TIFF": (tiff(1, 1, (16,) * 4, 5, grey(0, 65535, 65535, 0)), (255, 0, 0), ("16bit", "cmyk")),
    "16-bit grey TIFF, 0 is white": (tiff(1, 1, (16,), 0, grey(0xFFFF)), (0, 0, 0), ("16bit",)),
    "8-bit grey TIFF, 0 is white": (tiff(1, 1, (8,), 0, b"\xff"), (0, 0, 0), ()),
    "12-bit grey TIFF": (tiff(2, 1, (12,), 1, bytes([0x80, 0x08, 0x00])), (128, 128, 128), ("16bit",)),
    "32-bit grey TIFF of 16 bits": (tiff(1, 1, (32,), 1, grey(0x80FF, bits=32)), (128, 128, 128), ("16bit",)),
    "grey with premultiplied alpha": (
        tiff(1, 1, (8, 8), 1, bytes([40, 128]), tags={338: 1}),
        (167,) * 3,
        ("transparent",),
    ),
    "RGB with premultiplied alpha": (
        tiff(1, 1, (8,) * 4, 2, bytes([40, 20, 10, 128]), tags={338: 1}),
        (167, 147, 137),
        ("transparent",),
    ),
    "L*a*b* TIFF": (tiff(1, 1, (8,) * 3, 8, bytes([255, 0, 0])), WHITE, ()),
    "16-bit RGBA PNG": (png(1, 1, 6, 16, b"\0" + bytes([9, 9] * 3 + [0, 0])), WHITE, ("16bit", "transparent")),
    "16-bit grey PNG with alpha": (png(1, 1, 4, 16, b"\0\x80\0\xff\xff"), (128,) * 3, ("16bit",)),
    "16-bit grey PNG, a colour transparent": (
        png(1, 1, 0, 16, b"\0\x80\0", (b"tRNS", b"\x80\0")),
        (128,) * 3,
        ("16bit",),
    ),
    "RGB PNG, a colour transparent": (
        png(1, 1, 2, 8, b"\0\1\2\3", (b"tRNS", b"\0\1\0\2\0\3")),
        WHITE,
        ("transparent",),
    ),
    "grey PNG, a value transparent": (png(1, 1, 0, 8, b"\0\x80", (b"tRNS", b"\0\x80")), WHITE, ("transparent",)),
    "palette PNG, half transparent": (
        png(1, 1, 3, 8, b"\0\0", (b"PLTE", bytes([200, 100, 0])), (b"tRNS", b"\x80")),
        (227, 177, 127),
        ("palette", "transparent"),
    ),
    "1-bit PNG": (png(8, 1, 0, 1, b"\0\x80"), WHITE, ()),
    "RGB PNG of 16 pixels": (encoded(Image.new("RGB", (16, 16), (1, 2, 3)), "PNG"), (1, 2, 3), ()),
    "Adobe's inverted CMYK JPEG": (
        encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100),
        (255, 0, 0),
        ("cmyk",),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_unusual_samples_have_one_rule_each(name: str):
    data, pixel, notes = GOLDEN[name]
    decoded = read_image(data)
    found = decoded.image.getpixel((0, 0))
    assert np.abs(np.subtract(found, pixel)).max() <= (1 if name.startswith(("Adobe", "L*a*b*")) else 0), found
    assert decoded.notes == notes


@pytest.mark.parametrize(
    "data",
    [
        tiff(1, 1, (32,), 1, grey(65536, bits=32)),
        tiff(1, 1, (32,), 1, grey(2**32 - 1, bits=32)),
        tiff(1, 1, (16,), 1, grey(0xFFFF), tags={339: 2}),
    ],
    ids=["17 bits", "32 bits", "below 0"],
)
def test_whole_numbers_beyond_16_bits_are_refused_with_what_to_do(data: bytes):
    with pytest.raises(UnreadableImage, match="no agreed range; save it with 8 or 16 bits"):
        decode(data)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_used_as_it_is_shown(form: str):
    frames = [Image.new("RGBA", (16, 16), (255, 0, 0, 0)), Image.new("RGBA", (16, 16), (0, 0, 255, 255))]
    frames[0].paste((0, 128, 0, 255), (0, 0, 8, 16))
    data = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    decoded = read_image(data)
    assert {"animated", "transparent"} <= set(decoded.notes)
    assert (decoded.image.getpixel((2, 2)), decoded.image.getpixel((12, 2))) == ((0, 128, 0), WHITE)
