"""How fast data is curated and what memory that takes: photographs of 1024 px, and very many very small files.

The photographs are made here, the same ones every time: discs that cover each other, as large as the power law has it
that pictures of the world follow ("dead leaves"), with a texture of 1/f noise; PHOTOGRAPHS crops (20,000 unless the
environment says otherwise) of 200 such pictures as JPEGs of about 125 kB. SMALL_FILES (100,000) PNGs of 8 x 8 random
pixels have their captions in tables, and once more beside them, which makes it two files each. Both are kept in
`build/bench-curation` for the next time.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from components.storage import sha256_of
from tests.curation.folders import settle

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = int(os.environ.get("PHOTOGRAPHS", "20000"))
SMALL_FILES = int(os.environ.get("SMALL_FILES", "100000"))
PLACE = ROOT / "build" / "bench-curation"
SIDE = 1024
SCENES = 200
SCENE_SIDE = 2048
LEAVES = 1500
SAMPLE = 1000  # decoded alone before, and as many after


def scene(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (SCENE_SIDE, SCENE_SIDE))
    pen, ground = ImageDraw.Draw(image), random.integers(0, 256, 3)
    radii = np.sort(4 / np.sqrt(1 - random.random(LEAVES) * (1 - (4 / 500) ** 2)))[::-1]  # density r^-3 in 4 to 500 px
    colours = (ground + random.normal(0, 60, (LEAVES, 3))).clip(0, 255).astype(int).tolist()
    for (x, y), r, colour in zip(random.random((LEAVES, 2)) * SCENE_SIDE, radii, colours, strict=True):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(colour))
    frequency = np.hypot(np.fft.rfftfreq(SCENE_SIDE)[None], np.fft.fftfreq(SCENE_SIDE)[:, None])
    spectrum = np.exp(2j * np.pi * random.random(frequency.shape)) / np.maximum(frequency, 1 / SCENE_SIDE)
    texture = np.fft.irfft2(spectrum, s=(SCENE_SIDE, SCENE_SIDE))
    pixels = np.asarray(image) + (12 / texture.std() * texture)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """A folder of data that `write` fills, unless it has done so before; old enough for its files to be trusted."""
    folder = PLACE / name
    if not folder.exists():
        shutil.rmtree(unfinished := folder.with_name(f"{name}.part"), ignore_errors=True)
        write(unfinished)
        unfinished.rename(folder)
        settle()
    return folder


@pytest.fixture
def home() -> Iterator[Path]:
    """A workspace on the same disk as the data, gone after the test: pytest would keep its gigabytes."""
    PLACE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PLACE, prefix="home-") as folder:
        yield Path(folder)


def write_photographs(folder: Path) -> None:
    for seed in range(SCENES):
        whole, random = scene(seed), np.random.default_rng(10_000 + seed)
        part = folder / f"{seed:03}"
        part.mkdir(parents=True)
        with (part / "metadata.jsonl").open("w") as table:
            for number in range(PHOTOGRAPHS // SCENES):
                x, y = random.integers(0, SCENE_SIDE - SIDE, 2).tolist()
                whole.crop((x, y, x + SIDE, y + SIDE)).save(part / f"{number:04}.jpg", quality=72)
                table.write(json.dumps({"file_name": f"{number:04}.jpg", "text": f"leaves {seed} {number}"}) + "\n")


def tiny_png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 24), dtype=np.uint8)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_small_files(folder: Path, *, beside: bool) -> None:
    for first in range(0, SMALL_FILES, 1000):
        part = folder / f"{first // 1000:04}"
        part.mkdir(parents=True)
        rows = []
        for number in range(first, min(first + 1000, SMALL_FILES)):
            (part / f"{number:07}.png").write_bytes(tiny_png(number))
            if beside:
                (part / f"{number:07}.txt").write_text(f"noise {number}\n")
            rows.append(json.dumps({"file_name": f"{number:07}.png", "text": f"noise {number}"}))
        if not beside:
            (part / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def curated(home: Path, folder: Path, size: int, *flags: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.our_curation", home, folder, str(size), *flags],
                          cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def say(what: str, told: dict[str, Any]) -> None:
    parts = "  ".join(f"{name} {told[name]['wall']:.1f} s ({told[name]['cpu']:.1f} CPU s)"
                      for name in ("scan", "examine", "judge", "all") if name in told)
    counts = ", ".join(f"{told[name]:,} {name}" for name in ("files", "hashed", "examined", "kept", "rejected")
                       if name in told)
    print(f"{what}: {parts}; {counts}; peak {told['peak_mb']:.0f} MB")


def decode_ms(paths: list[Path]) -> float:
    """CPU ms that decoding a picture in full takes, its bytes in memory."""
    bodies, started = [path.read_bytes() for path in paths], time.process_time()
    for body in bodies:
        with Image.open(BytesIO(body)) as image:
            image.load()
    return (time.process_time() - started) / len(paths) * 1000


def test_photographs_are_scanned_and_checked(home: Path):
    folder = made_once(f"photographs-{PHOTOGRAPHS}", write_photographs)
    paths = sorted(folder.rglob("*.jpg"))
    kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
    sample = paths[:: max(1, len(paths) // SAMPLE)][:SAMPLE]
    before = decode_ms(sample)
    told = curated(home, folder, SIDE)
    after = decode_ms(sample)
    again = curated(home, folder, SIDE, "--scan")
    say(f"{len(paths):,} photographs of {kilobytes:.0f} kB, first time", told)
    say("again, unchanged", again)
    each = told["all"]["cpu"] / len(paths) * 1000
    print(f"a picture takes {each:.1f} CPU ms, {1000 / each:.0f} a second and core; decoding it alone {before:.2f} ms"
          f" before and {after:.2f} ms after: ratio {2 * each / (before + after):.2f}")
    print(f"wall: {len(paths) / told['all']['wall']:.0f} pictures a second on {len(os.sched_getaffinity(0))} cores")
    distinct = len({sha256_of(path) for path in paths})  # two cuts of one photograph may be the same bytes
    assert (told["examined"], told["hashed"], again["hashed"]) == (distinct, len(paths), 0)
    assert told["peak_mb"] < 2000


def test_very_many_small_files_are_looked_at_again(home: Path):
    tables = made_once(f"tables-{SMALL_FILES}", partial(write_small_files, beside=False))
    beside = made_once(f"beside-{SMALL_FILES}", partial(write_small_files, beside=True))
    first = curated(home, tables, 8)
    unchanged = curated(home, tables, 8, "--scan")
    for number in range(0, SMALL_FILES, 100):
        path = tables / f"{number // 1000:04}" / f"{number:07}.png"
        other = tiny_png(number + 2 * SMALL_FILES if path.read_bytes() == tiny_png(number) else number)
        path.write_bytes(other)
    changed = curated(home, tables, 8)
    curated(home, beside, 8, "--scan")
    two_files_each = curated(home, beside, 8, "--scan")
    say("captions in tables, first time", first)
    say("unchanged", unchanged)
    say("1 % changed", changed)
    say("captions beside, unchanged", two_files_each)
    assert (first["hashed"], first["examined"]) == (SMALL_FILES, SMALL_FILES)
    assert (unchanged["hashed"], two_files_each["hashed"]) == (0, 0)
    assert (changed["hashed"], changed["examined"]) == (SMALL_FILES // 100, SMALL_FILES // 100)
