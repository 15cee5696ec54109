"""Picture files put together by hand, for what Pillow does not write: claims in headers, odd samples, bombs."""

import struct
import zlib

SHORT, LONG = 3, 4  # types of a TIFF's values, with their sizes
SIZES = {SHORT: 2, LONG: 4}
AT_THE_END = -1  # in a TIFF's tag: where the samples begin


def png(width: int, height: int, colour: int, bits: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """`colour` is the PNG's colour type; `rows` are the filtered rows, `chunks` come before them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    before = b"".join(chunk(kind, data) for kind, data in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(
    width: int,
    height: int,
    bits: tuple[int, ...],
    meaning: int,
    samples: bytes,
    *,
    compression: int = 1,
    tile: tuple[int, int] | None = None,
    tags: dict[int, int] | None = None,
) -> bytes:
    """One page, little-endian. `meaning` is the PhotometricInterpretation; `tags` are further ones of one value."""
    found = {
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, list(bits)),
        259: (SHORT, [compression]),
        262: (SHORT, [meaning]),
        277: (SHORT, [len(bits)]),
    }
    place, size = (324, 325) if tile else (273, 279)
    found |= {place: (LONG, [AT_THE_END]), size: (LONG, [len(samples)])}
    found |= {322: (LONG, [tile[0]]), 323: (LONG, [tile[1]])} if tile else {278: (LONG, [height])}
    found |= {tag: (SHORT, [value]) for tag, value in (tags or {}).items()}
    apart_at = 8 + 2 + 12 * len(found) + 4
    apart = b"".join(_values(kind, values) for _, (kind, values) in sorted(found.items()) if _is_apart(kind, values))
    entries, at = b"", apart_at
    for tag, (kind, values) in sorted(found.items()):
        entries += struct.pack("<HHI", tag, kind, len(values))
        if _is_apart(kind, values):
            entries += struct.pack("<I", at)
            at += len(values) * SIZES[kind]
        else:
            entries += _values(kind, [apart_at + len(apart) if value == AT_THE_END else value for value in values])
    return b"II*\0" + struct.pack("<IH", 8, len(found)) + entries + struct.pack("<I", 0) + apart + samples


def tiff_pages(number: int) -> bytes:
    """As many pages of one pixel, each with the directory that Pillow asks for; the last points at the first."""
    tags = ((256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1))
    length = 2 + 12 * len(tags) + 4
    body = b"".join(struct.pack("<HHIHH", tag, SHORT, 1, value, 0) for tag, value in tags)
    starts = [12 + length * i for i in range(number)]
    pages = [struct.pack("<H", len(tags)) + body + struct.pack("<I", after) for after in (*starts[1:], starts[0])]
    return b"II*\0" + struct.pack("<I", 12) + b"\x80\0\0\0" + b"".join(pages)


def webp_canvas(width: int, height: int) -> bytes:
    """An animation that says how large it is and has no frame."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + b"ANIM" + struct.pack("<I", 6) + b"\0" * 6
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_header(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def gif(width: int, height: int, frames: list[tuple[int, int]]) -> bytes:
    """Frames of the given sizes on a screen of `width` x `height`; each holds one pixel's worth of data."""
    frame = b"".join(b"\x2c" + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x02\x02\x44\x01\x00" for size in frames)
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame + b"\x3b"


def jpeg_header(width: int, height: int) -> bytes:
    return b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\0\xff\xd9"


def _is_apart(kind: int, values: list[int]) -> bool:
    return len(values) * SIZES[kind] > 4


def _values(kind: int, values: list[int]) -> bytes:
    return b"".join(struct.pack("<H" if kind == SHORT else "<I", value) for value in values).ljust(4, b"\0")
