"""How pictures come to their buckets: what is cut off and what is enlarged, in numbers and as a sheet of the worst."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from components.latents.buckets import Placement

CELL = 208  # pixels, of a picture on the sheet
LINE = 18  # and of a line of text under it
LINES = 3
GAP = 14
TITLE = 34
COLUMNS = 5
DIMMED = 0.3  # brightness of what is cut off
FRAME = 2  # pixels, round what is kept
EDGE, INK, FADED, PAPER, PADDING = (220, 40, 40), (20, 20, 20), (105, 105, 105), (255, 255, 255), (222, 222, 222)


@dataclass(frozen=True, slots=True)
class Crop:
    """A picture of width x height pixels and how it comes to its bucket."""

    width: int
    height: int
    placement: Placement

    @property
    def share(self) -> float:
        """Of the picture's area, 0 to 1, that is cut off."""
        return 1.0 - self._shown / (self.placement.width * self.placement.height)

    @property
    def padding(self) -> float:
        """Of the bucket's area, 0 to 1, that is no picture."""
        return 1.0 - self._shown / (self.placement.bucket.width * self.placement.bucket.height)

    @property
    def loss(self) -> float:
        """What the bucket's shape costs: of the picture where it is cropped, of the bucket where it is padded."""
        return max(self.share, self.padding)

    @property
    def scale(self) -> float:
        """Its sides in training over its sides as they are; above 1 it is enlarged."""
        return max(self.placement.width / self.width, self.placement.height / self.height)

    @property
    def _shown(self) -> int:
        left, top, right, bottom = self.placement.content
        return (right - left) * (bottom - top)

    def window(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the bucket in a copy of the picture of this size; beyond it where it pads."""
        placement, bucket = self.placement, self.placement.bucket
        across, down = width / placement.width, height / placement.height
        return (
            round(placement.left * across),
            round(placement.top * down),
            round((placement.left + bucket.width) * across),
            round((placement.top + bucket.height) * down),
        )


def crop_sheet(shown: Sequence[tuple[Image.Image, Crop, str]], title: str) -> Image.Image:
    """Pictures (RGB, upright): what is cut off dimmed, padding grey, the bucket framed; below its loss, sizes, name."""
    rows, columns = -(-len(shown) // COLUMNS), min(COLUMNS, len(shown))
    down = CELL + LINES * LINE + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, TITLE + rows * down + GAP), PAPER)
    pen, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(15)
    pen.text((GAP, GAP), _fitting(pen, title, large, sheet.width - 2 * GAP), INK, large)
    for i, (image, crop, name) in enumerate(shown):
        left, top = GAP + i % COLUMNS * (CELL + GAP), TITLE + GAP + i // COLUMNS * down
        cell = _framed(image, crop)
        sheet.paste(cell, (left + (CELL - cell.width) // 2, top + CELL - cell.height))
        for line, (text, ink, font) in enumerate(
            ((_said(crop), INK, large), (_sizes(crop), FADED, small), (name, INK, small))
        ):
            pen.text((left, top + CELL + 4 + line * LINE), _fitting(pen, text, font, CELL), ink, font)
    return sheet


def _framed(image: Image.Image, crop: Crop) -> Image.Image:
    """Picture and window together, as large as a cell."""
    left, top, right, bottom = crop.window(*image.size)
    outer = min(0, left), min(0, top), max(image.width, right), max(image.height, bottom)
    scale = CELL / max(outer[2] - outer[0], outer[3] - outer[1])
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(size, Image.Resampling.LANCZOS)
    left, top, right, bottom = crop.window(*size)
    across, down = max(0, -left), max(0, -top)
    framed = Image.new("RGB", (max(size[0], right) + across, max(size[1], bottom) + down), PADDING)
    framed.paste(ImageEnhance.Brightness(small).enhance(DIMMED), (across, down))
    kept = max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)
    framed.paste(small.crop(kept), (kept[0] + across, kept[1] + down))
    box = left + across, top + down, right + across - 1, bottom + down - 1
    ImageDraw.Draw(framed).rectangle(box, outline=EDGE, width=FRAME)
    return framed


def _said(crop: Crop) -> str:
    if crop.padding > crop.share:
        return f"{crop.padding:.1%} padding"
    return f"{crop.share:.1%} cut off" + (f", enlarged {crop.scale:.2f}x" if crop.scale > 1 else "")


def _sizes(crop: Crop) -> str:
    bucket = crop.placement.bucket
    return f"{crop.width}x{crop.height} to {bucket.width}x{bucket.height}, scale {crop.scale:.2f}"


def _fitting(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, room: int) -> str:
    """The text without its middle where there is no room for all of it."""
    shown, cut = text, len(text)
    while pen.textlength(shown, font) > room and cut > 2:
        cut -= 1
        shown = f"{text[: cut // 2]}…{text[len(text) - cut // 2 :]}"
    return shown
