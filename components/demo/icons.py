"""The demo's data: Font Awesome's pictograms drawn as the app icons of an imagined brand, in its five colours.

Written as an ordinary image folder, the kind a user would bring. Concepts of the held-out part are absent from the
training part, so that an adapter has to carry the style over to things it was never shown in that style.
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from components.curation.duplicates import dhash, phash
from components.errors import BadInput
from components.evaluation.palette import background, nearest_colour
from components.storage import atomic_write

SIZE = 64  # px, the resolution of the embedded base
OVERSAMPLING = 4  # drawn larger, then reduced: smooth edges
MARGIN, RADIUS, GLYPH_BOX = 3, 14, 38  # px of the final icon; the box leaves the ring of `background_colour` free
HELD_OUT_CONCEPTS = 60
SALT = "app-icons"
SAME_SHAPE_BITS = (8, 10)  # of pHash and dHash: a training glyph this close to a held-out one is left out

PALETTE: dict[str, tuple[int, int, int]] = {  # a word the base knows, and the brand's own shade of it
    "red": (222, 52, 62),
    "orange": (247, 140, 32),
    "green": (34, 160, 92),
    "blue": (38, 112, 230),
    "purple": (128, 66, 190),
}

LICENCE, AUTHOR, SOURCE = "CC-BY-4.0", "Fonticons, Inc.", "https://fontawesome.com"
ATTRIBUTION_NAME, METADATA_NAME = "ATTRIBUTION.md", "metadata.jsonl"
ATTRIBUTION = """# Attribution
The pictograms are from Font Awesome Free 6.6.0 by Fonticons, Inc. (https://fontawesome.com), licensed under
Creative Commons Attribution 4.0 International (https://creativecommons.org/licenses/by/4.0/).

Changes: each glyph was drawn in white on a rounded square of one of five colours and reduced to 64x64 pixels.
"""


@dataclass(frozen=True, slots=True)
class Pictogram:
    """A glyph of the font, with the words for it and the concept it belongs to."""

    glyph: str  # Font Awesome's name
    concept: str
    words: str  # what the caption calls it


@dataclass(frozen=True, slots=True)
class Icon:
    """One picture to draw."""

    pictogram: Pictogram
    colour: str
    split: str  # "train" or "test"

    @property
    def file_name(self) -> str:
        return f"{self.split}/{self.pictogram.glyph}-{self.colour}.png"

    @property
    def caption(self) -> str:
        return caption(self.pictogram.words, self.colour)


@dataclass(frozen=True, slots=True)
class IconCounts:
    """What `write_icons` wrote, in pictures and concepts."""

    train: int
    test: int
    train_concepts: int
    test_concepts: int


def caption(words: str, colour: str) -> str:
    """The prompt for an icon: `caption("rocket", "red")` is "red rocket, app icon style".

    The word order is that of the base's own captions: colour, name, style.
    """
    return f"{colour} {words}, app icon style"


def pictograms() -> list[Pictogram]:
    """Every pictogram of the demo, as the table beside this module lists them."""
    found = []
    for line in Path(__file__).with_name("pictograms.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            concept, _, glyphs = line.partition(": ")
            for entry in glyphs.split():
                glyph, _, words = entry.partition("=")
                found.append(Pictogram(glyph, concept, words.replace("_", " ") or concept))
    return found


def draw_icon(glyph: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """A white glyph on a rounded square of `colour`, white outside; RGB, SIZE x SIZE. `glyph`: from `Glyphs.mask`."""
    ground = ImageChops.subtract(_rounded_square(), glyph)
    return Image.composite(Image.new("RGB", ground.size, colour), Image.new("RGB", ground.size, "white"), ground)


class Glyphs:
    """The solid font: glyph name -> coverage mask. Raises BadInput when the font's package is not installed."""

    def __init__(self) -> None:
        spec = find_spec("fontawesomefree")
        if spec is None or spec.origin is None:
            raise BadInput("fontawesomefree is not installed, and the demo draws its icons from it; "
                           "install safelight with its 'demo' extra")
        root = Path(spec.origin).parent / "static" / "fontawesomefree"
        table = json.loads((root / "metadata" / "icons.json").read_text(encoding="utf-8"))
        self._characters = {name: chr(int(icon["unicode"], 16)) for name, icon in table.items()
                            if "solid" in icon["styles"]}
        self._font = (root / "webfonts" / "fa-solid-900.ttf").read_bytes()
        self._masks: dict[str, Image.Image] = {}

    def mask(self, glyph: str) -> Image.Image:
        """Coverage of the glyph, mode L, SIZE x SIZE: scaled to fit GLYPH_BOX and centred."""
        if glyph not in self._masks:
            self._masks[glyph] = self._draw(self._characters[glyph])
        return self._masks[glyph]

    def _draw(self, character: str) -> Image.Image:
        box, side = GLYPH_BOX * OVERSAMPLING, SIZE * OVERSAMPLING
        left, top, right, bottom = self._at(box).getbbox(character)
        font = self._at(int(box * box / max(right - left, bottom - top)))
        left, top, right, bottom = font.getbbox(character)
        mask = Image.new("L", (side, side))
        origin = ((side - left - right) / 2, (side - top - bottom) / 2)
        ImageDraw.Draw(mask).text(origin, character, fill=255, font=font)
        return mask.reduce(OVERSAMPLING)

    def _at(self, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(BytesIO(self._font), size)


@cache
def _rounded_square() -> Image.Image:
    side, margin = SIZE * OVERSAMPLING, MARGIN * OVERSAMPLING
    square = Image.new("L", (side, side))
    box = (margin, margin, side - margin - 1, side - margin - 1)
    ImageDraw.Draw(square).rounded_rectangle(box, RADIUS * OVERSAMPLING, fill=255)
    return square.reduce(OVERSAMPLING)


def plan_icons(known_words: Collection[str], glyphs: Glyphs) -> list[Icon]:
    """Which icons the demo consists of; a function of the pictogram table and of the words the base knows.

    `known_words` may hold whole names ("hot dog") too. Only concepts that are known by name or word by word come in: an
    adapter that has to learn new things as well learns the style less well. HELD_OUT_CONCEPTS of them, chosen by a
    salted hash, are held out. Every pictogram comes in all colours, so that nothing but the word tells which is asked
    for.
    A training concept named after a held-out one ("open book" beside "book"), and a training glyph shaped like a
    held-out one, are left out.
    """
    by_concept: dict[str, list[Pictogram]] = {}
    for pictogram in pictograms():
        by_concept.setdefault(pictogram.concept, []).append(pictogram)
    known = {word.lower() for word in known_words}
    by_lot = sorted((c for c in by_concept if c in known or set(c.split()) <= known), key=_lot)
    held_out = list(islice(_without_namesakes(by_lot), HELD_OUT_CONCEPTS))
    test = [by_concept[concept][0] for concept in held_out]
    unseen_shapes = [_shape(glyphs, pictogram) for pictogram in test]

    icons = [Icon(pictogram, colour, "test") for pictogram in test for colour in PALETTE]
    for concept in by_lot:
        if concept in held_out or any(_named_after(concept, other) for other in held_out):
            continue
        for pictogram in by_concept[concept]:
            shape = _shape(glyphs, pictogram)
            if not any(_alike(shape, unseen) for unseen in unseen_shapes):
                icons += [Icon(pictogram, colour, "train") for colour in PALETTE]
    return sorted(icons, key=lambda icon: icon.file_name)


def write_icons(folder: Path, known_words: Collection[str]) -> IconCounts:
    """Draw the demo's icons into `folder` with `metadata.jsonl`, which comes last, and the attribution they need."""
    glyphs = Glyphs()
    icons = plan_icons(known_words, glyphs)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    for icon in icons:
        draw_icon(glyphs.mask(icon.pictogram.glyph), PALETTE[icon.colour]).save(folder / icon.file_name)
    (folder / ATTRIBUTION_NAME).write_text(ATTRIBUTION, encoding="utf-8")
    with atomic_write(folder / METADATA_NAME) as table:
        for icon in icons:
            table.write(json.dumps(_row(icon), ensure_ascii=False).encode() + b"\n")
    return _count(icons)


def background_colour(image: Image.Image) -> str:
    """The palette's name for an icon's ground: nearest to the median of a ring 8 to 14 % inside the edge."""
    return nearest_colour(background(image), PALETTE)


def _row(icon: Icon) -> dict[str, str]:
    return {"file_name": icon.file_name, "text": icon.caption, "group": icon.pictogram.concept, "split": icon.split,
            "licence": LICENCE, "author": AUTHOR, "source": SOURCE}


def _count(icons: list[Icon]) -> IconCounts:
    train = [icon for icon in icons if icon.split == "train"]
    test = [icon for icon in icons if icon.split == "test"]
    return IconCounts(len(train), len(test), len({i.pictogram.concept for i in train}),
                      len({i.pictogram.concept for i in test}))


def _lot(name: str) -> str:
    return hashlib.sha256(f"{SALT}\0{name}".encode()).hexdigest()


def _named_after(concept: str, other: str) -> bool:
    return set(other.split()) <= set(concept.split()) or set(concept.split()) <= set(other.split())


def _without_namesakes(concepts: list[str]) -> Iterator[str]:
    kept: list[str] = []
    for concept in concepts:
        if not any(_named_after(concept, other) for other in kept):
            kept.append(concept)
            yield concept


def _shape(glyphs: Glyphs, pictogram: Pictogram) -> tuple[int, int]:
    icon = draw_icon(glyphs.mask(pictogram.glyph), PALETTE["blue"])
    return phash(icon), dhash(icon)


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return all((a ^ b).bit_count() <= limit for a, b, limit in zip(one, other, SAME_SHAPE_BITS, strict=True))
