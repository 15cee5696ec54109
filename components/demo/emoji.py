"""Emoji drawings of three vendors as an ordinary image folder: the data of the embedded base model.

The pictures come from npm packages (`VENDORS`); names and tags from `emojibase-data`, which follows Unicode CLDR.
Every picture is composited on white at 64x64 px.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.errors import BadInput

SIZE = 64  # px, the resolution of the embedded base
METADATA_NAME = "metadata.jsonl"
CONCEPTS_PATH = Path(__file__).with_name("concepts.txt")


@dataclass(frozen=True, slots=True)
class Vendor:
    """One drawing style: where its package keeps the pictures, and whom to credit."""

    style: str
    package: str
    pattern: str  # of the picture's path inside the package; {code} is the lower-case code point sequence
    license: str
    author: str
    source: str


VENDORS = (
    Vendor("noto", "emoji-datasource-google", "img/google/64/{code}.png", "Apache-2.0", "Google",
           "https://github.com/googlefonts/noto-emoji"),
    Vendor("twemoji", "emoji-datasource-twitter", "img/twitter/64/{code}.png", "CC-BY-4.0", "Twitter and contributors",
           "https://github.com/jdecked/twemoji"),
    Vendor("fluent", "@lobehub/fluent-emoji-3d", "assets/{code}.webp", "MIT", "Microsoft, packaged by LobeHub",
           "https://github.com/microsoft/fluentui-emoji"),
)  # fmt: skip

# Hue ranges in degrees that people agree on, with the word the captions use.
HUES = ((345, 360, "red"), (0, 13, "red"), (16, 40, "orange"), (42, 66, "yellow"), (80, 165, "green"),
        (190, 245, "blue"), (255, 300, "purple"), (318, 342, "pink"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawing:
    """One vendor's picture of one emoji, with everything its captions are made of."""

    code: str  # code points, lower case, joined by hyphens, without U+FE0F
    name: str
    synonyms: tuple[str, ...]
    concrete: bool  # member of the curated concepts that the denoiser learns
    vendor: Vendor
    path: Path


def drawings(node_modules: Path) -> Iterator[Drawing]:
    """Every emoji picture without flags and skin tones, in Unicode order, vendor by vendor.

    Raises: BadInput when a package is missing under `node_modules`.
    """
    concepts = _concepts()
    entries = _read_json(node_modules / "emojibase-data/en/data.json")
    subgroups = {
        int(k): v for k, v in _read_json(node_modules / "emojibase-data/meta/groups.json")["subgroups"].items()
    }
    files = {vendor.style: _files(node_modules, vendor) for vendor in VENDORS}
    short_names = {
        _code(e["unified"]): e["short_names"] for e in _read_json(node_modules / "emoji-datasource-google/emoji.json")
    }
    entries = [e for e in entries if "subgroup" in e and "flag" not in subgroups[e["subgroup"]]]
    rarity = Counter(tag for e in entries for tag in e.get("tags", ()))
    for entry in sorted(entries, key=lambda e: e["order"]):
        code, label = _code(entry["hexcode"]), entry["label"]
        name = str(concepts.get(label, label)).lower().replace("’", "'")
        words = [*(s.replace("_", " ").replace("-", " ") for s in short_names.get(code, ())),
                 *(tag for tag in entry.get("tags", ()) if rarity[tag] <= 3)]  # fmt: skip
        synonyms = tuple(dict.fromkeys(w.lower() for w in words if w.lower() != name and len(w) > 2))[:4]
        for vendor in VENDORS:
            if path := files[vendor.style].get(code):
                yield Drawing(code, name, synonyms, label in concepts, vendor, path)


def write_image_folder(node_modules: Path, destination: Path) -> int:
    """Write every drawing as a 64x64 RGB PNG on white, with one row per picture in `metadata.jsonl`.

    A row holds file_name, text (name and style), group (the emoji, so that splits keep vendors together), name,
    synonyms, style, color (a colour word, or null where no hue dominates), concrete, license, author and source.
    Returns the number of pictures. Raises: BadInput when a package is missing.
    """
    destination.mkdir(parents=True, exist_ok=True)
    rows = []
    for drawing in drawings(node_modules):
        image = on_white(Image.open(drawing.path), SIZE)
        file_name = f"{drawing.vendor.style}-{drawing.code}.png"
        image.save(destination / file_name)
        rows.append(
            {
                "file_name": file_name,
                "text": f"{drawing.name}, {drawing.vendor.style} style",
                "group": drawing.code,
                "name": drawing.name,
                "synonyms": list(drawing.synonyms),
                "style": drawing.vendor.style,
                "color": dominant_color(image),
                "concrete": drawing.concrete,
                "license": drawing.vendor.license,
                "author": drawing.vendor.author,
                "source": drawing.vendor.source,
            }
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (destination / METADATA_NAME).write_text(text, encoding="utf-8")
    return len(rows)


def on_white(image: Image.Image, size: int) -> Image.Image:
    """The picture scaled to size x size px (Lanczos on premultiplied alpha) over white, as RGB."""
    rgba = image.convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def dominant_color(image: Image.Image) -> str | None:
    """The colour word that covers most of the picture's non-white pixels, or None when no word covers 70 % of them."""
    hue, saturation, value = np.asarray(image.convert("HSV"), dtype=np.float32).reshape(-1, 3).T / 255
    drawn = (saturation > 0.1) | (value < 0.9)
    vivid = drawn & (saturation > 0.35) & (value > 0.35)
    if drawn.sum() < 100:
        return None
    degrees = hue * 360
    shares: Counter[str] = Counter()
    for low, high, word in HUES:
        shares[word] += int((vivid & (degrees >= low) & (degrees <= high)).sum())
    word, count = shares.most_common(1)[0]
    return word if count >= 0.7 * drawn.sum() else None


def _concepts() -> dict[str, str]:
    """CLDR label -> what captions call it, of the concepts that the denoiser learns."""
    lines = [line for line in CONCEPTS_PATH.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pairs = [line.partition(" = ") for line in lines]
    return {label: name or label for label, _, name in pairs}


def _code(sequence: str) -> str:
    return sequence.lower().replace("-fe0f", "")


def _files(node_modules: Path, vendor: Vendor) -> dict[str, Path]:
    pattern = node_modules / vendor.package / vendor.pattern
    files = {_code(path.stem): path for path in sorted(pattern.parent.glob(f"*{pattern.suffix}"))}
    if not files:
        raise BadInput(f"{pattern.parent}: no {pattern.suffix} pictures; run `npm install {vendor.package}` first")
    return files


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(f"{path}: not found; run `npm install {path.parts[-3]}` next to it first")
    return json.loads(path.read_text(encoding="utf-8"))
