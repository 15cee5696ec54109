"""One decoder, one documented rule per kind of file, and no bytes that crash it or fill the memory."""

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from components.curation.pixels import NOTES, UnreadableImage, decode, read_image, rgb_digest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]


def picture(size: tuple[int, int] = (40, 24)) -> Image.Image:
    """No symmetry: every orientation looks different."""
    image = Image.new("RGB", size, (200, 30, 30))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, size[0] // 2, size[1] // 3), fill=(20, 20, 220))
    draw.rectangle((2, size[1] - 6, 9, size[1] - 2), fill=(250, 240, 20))
    return image


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, body: bytes = b"\0" * 64, bits: int = 8) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + b"ANIM" + struct.pack("<I", 6) + b"\0" * 6
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_header(width: int, height: int) -> bytes:
    file_header = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    return file_header + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def gif_header(width: int, height: int) -> bytes:
    return (b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
            + b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00\x3b")


# What becomes of the pixels

@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_the_same_pixels_in_another_container_have_the_same_digest(form: str):
    image = picture()
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    decoded = read_image(encoded(image, form, **options))
    assert rgb_digest(decoded.image) == rgb_digest(image)
    assert decoded.format == form and decoded.image.info == {}


def test_the_digest_tells_shapes_with_equal_bytes_apart():
    assert rgb_digest(Image.new("RGB", (4, 2))) != rgb_digest(Image.new("RGB", (2, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_exif_orientations_give_the_same_upright_picture(orientation: int):
    upright = picture()
    stored = upright.transpose({
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = read_image(encoded(stored, "PNG", exif=exif))
    assert rgb_digest(decoded.image) == rgb_digest(upright)
    assert decoded.notes == (("rotated",) if orientation > 1 else ())


def test_gps_is_reported_and_left_behind():
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    decoded = read_image(encoded(picture(), "JPEG", exif=exif))
    assert decoded.notes == ("gps",) and decoded.image.info == {} and not decoded.image.getexif()


def test_damaged_metadata_does_not_spoil_the_pixels():
    data = encoded(picture(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 9)
    assert rgb_digest(decode(data)) == rgb_digest(picture())


def flat() -> Image.Image:
    return Image.new("RGB", (4, 4), (200, 100, 0))


def rgba(alpha: int) -> Image.Image:
    image = Image.new("RGBA", (4, 4), (200, 100, 0, alpha))
    image.putpixel((0, 0), (200, 100, 0, 255))
    return image


def grey16(form: str) -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16)), form)


def palette_with_hole() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((0, 0), 0)
    return encoded(image, "PNG", transparency=0)


GOLDEN = {   # name: bytes, pixel (1, 1), pixel (0, 0), notes
    "opaque alpha": (encoded(rgba(255), "PNG"), (200, 100, 0), (200, 100, 0), ()),
    "transparent": (encoded(rgba(0), "PNG"), (255, 255, 255), (200, 100, 0), ("transparent",)),
    "half transparent": (encoded(rgba(128), "PNG"), (227, 177, 127), (200, 100, 0), ("transparent",)),
    "grey with alpha": (encoded(Image.new("LA", (4, 4), (90, 0)), "PNG"), (255,) * 3, (255,) * 3, ("transparent",)),
    "palette": (encoded(flat().quantize(4), "PNG"), (200, 100, 0), (200, 100, 0), ("palette",)),
    "palette with a hole": (palette_with_hole(), (200, 100, 0), (255, 255, 255), ("palette", "transparent")),
    "grey": (encoded(Image.new("L", (4, 4), 90), "PNG"), (90,) * 3, (90,) * 3, ()),
    "one bit": (encoded(Image.new("1", (4, 4), 1), "PNG"), (255,) * 3, (255,) * 3, ()),
    "16 bits PNG": (grey16("PNG"), (0x80,) * 3, (0x80,) * 3, ("16bit",)),
    "16 bits TIFF": (grey16("TIFF"), (0x80,) * 3, (0x80,) * 3, ("16bit",)),
    "CMYK": (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0), (255, 0, 0), ("cmyk",)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_every_kind_of_pixel_has_one_rule(name: str):
    data, inside, corner, notes = GOLDEN[name]
    decoded = read_image(data)
    assert decoded.image.mode == "RGB"
    assert (decoded.image.getpixel((1, 1)), decoded.image.getpixel((0, 0)), decoded.notes) == (inside, corner, notes)
    assert set(decoded.notes) <= set(NOTES)


def test_transparency_is_laid_on_the_background_that_is_asked_for():
    assert decode(encoded(rgba(0), "PNG"), (0, 0, 0)).getpixel((1, 1)) == (0, 0, 0)


def test_a_cmyk_jpeg_and_a_16_bit_colour_png_are_noted():
    assert read_image(encoded(picture().convert("CMYK"), "JPEG")).notes == ("cmyk",)
    body = b"".join(b"\0" + struct.pack(">12H", *[0x40FF, 0x80FF, 0xC0FF] * 4) for _ in range(2))
    decoded = read_image(png_header(4, 2, body, bits=16))
    assert decoded.notes == ("16bit",) and decoded.image.getpixel((0, 0)) == (0x40, 0x80, 0xC0)


def test_a_colour_profile_is_converted_and_a_damaged_one_ignored():
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = picture()
    assert read_image(encoded(image, "PNG", icc_profile=srgb)).notes == ()
    assert rgb_digest(decode(encoded(image, "PNG", icc_profile=srgb))) == rgb_digest(image)
    for profile in (lab_like, b"no profile at all"):
        decoded = read_image(encoded(image, "PNG", icc_profile=profile))
        assert decoded.notes == ("profile_ignored",) and rgb_digest(decoded.image) == rgb_digest(image)


@pytest.mark.parametrize(("form", "note"), [
    ("GIF", "animated"), ("WEBP", "animated"), ("PNG", "animated"), ("TIFF", "multipage"),
])
def test_the_first_of_several_frames_is_used(form: str, note: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    decoded = read_image(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert decoded.image.getpixel((3, 3)) == (255, 0, 0) and note in decoded.notes


# What is refused

@pytest.mark.parametrize("data", [
    b"", b"a caption, not a picture", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"8BPS\0\1", b"\0" * 1000,
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
])
def test_what_is_no_picture_is_refused_with_one_line(data: bytes):
    with pytest.raises(UnreadableImage) as caught:
        decode(data)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value).replace("\\x", "")
    assert ("empty (0 bytes)" if not data else "the file begins with") in str(caught.value)


@pytest.mark.parametrize("form", ["ICO", "PPM", "TGA", "PCX", "EPS", "PDF", "ICNS", "JPEG2000"])
def test_formats_outside_the_list_are_not_opened_although_pillow_could(form: str):
    with pytest.raises(UnreadableImage, match="not a PNG, JPEG, WEBP, GIF, BMP, TIFF image"):
        decode(encoded(picture((64, 64)), form))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_a_file_that_is_cut_short_is_refused(form: str, share: float):
    g = np.random.default_rng(0)
    data = encoded(Image.fromarray(g.integers(0, 256, (48, 64, 3), dtype=np.uint8)), form)
    assert decode(data).size == (64, 48)
    with pytest.raises(UnreadableImage, match=r"cut short or damaged|not a"):
        decode(data[:int(len(data) * share)])


def test_a_tiff_whose_header_promises_more_rows_than_it_holds_is_refused():
    data = bytearray(encoded(picture(), "TIFF"))
    directory = struct.unpack("<I", data[4:8])[0]
    entries = [directory + 2 + 12 * i for i in range(struct.unpack_from("<H", data, directory)[0])]
    [height] = [entry for entry in entries if struct.unpack_from("<H", data, entry)[0] == 257]
    struct.pack_into("<I", data, height + 8, 48)
    with pytest.raises(UnreadableImage, match="its header says 48 rows"):
        decode(bytes(data))


def test_floating_point_pixels_are_refused_with_what_to_do():
    with pytest.raises(UnreadableImage, match="save it with 8 or 16 bits"):
        decode(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


@pytest.mark.parametrize("data", [
    png_header(100_000, 100_000), png_header(65_000, 1_000), webp_header(16_383, 16_383), webp_header(65_000, 65_000),
    bmp_header(30_000, 30_000), gif_header(65_000, 65_000), png_header(2**31 - 1, 2**31 - 1),
], ids=["PNG 100k", "PNG wide", "WebP 16k", "WebP 65k", "BMP 30k", "GIF 65k", "PNG largest"])
def test_a_bomb_is_refused_from_its_header_in_no_time(data: bytes):
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(UnreadableImage):
        decode(data)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 20e6


def test_the_pixel_limit_is_exact_and_says_what_was_found():
    data = encoded(Image.new("RGB", (100, 50)), "PNG")
    assert read_image(data, max_pixels=5_000).image.size == (100, 50)
    with pytest.raises(UnreadableImage, match=r"100 x 50 pixels, more than 4,999; scale it down"):
        read_image(data, max_pixels=4_999)


def test_no_mutated_file_raises_anything_else():
    g = np.random.default_rng(0)
    images = [encoded(picture(), form) for form in FORMATS] + [data for data, *_ in GOLDEN.values()]
    opened = 0
    for trial in range(600):
        data = bytearray(images[trial % len(images)])
        for _ in range(g.integers(1, 8)):
            data[g.integers(0, len(data))] = g.integers(0, 256)
        try:
            opened += decode(bytes(data), (0, 0, 0)).mode == "RGB"
        except UnreadableImage as error:
            assert "\n" not in str(error)
    assert 50 < opened < 550
