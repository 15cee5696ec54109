"""How pictures come to their buckets: what is cut off and what is enlarged, in numbers and as a sheet of the worst."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance

from components.latents.buckets import Bucket, assign, cropped_share, placement

CELL = 192  # pixels, of a picture on the sheet
LABEL = 18  # and of the line under it
GAP = 8
COLUMNS = 5
DIMMED = 0.3  # brightness of what is cut off
EDGE = (220, 40, 40)


@dataclass(frozen=True, slots=True)
class Crop:
    """A picture of width x height pixels and the bucket it goes to."""

    width: int
    height: int
    bucket: Bucket

    @classmethod
    def of(cls, width: int, height: int, sizes: tuple[Bucket, ...]) -> "Crop":
        return cls(width, height, assign(width, height, sizes))

    @property
    def share(self) -> float:
        """Of the picture's area, 0 to 1, that is cut off."""
        return cropped_share(self.width, self.height, self.bucket)

    @property
    def scale(self) -> float:
        """Its sides in training over its sides as they are; above 1 it is enlarged."""
        return max(self.bucket.width / self.width, self.bucket.height / self.height)

    def kept(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of what is kept, in a copy of the picture of this size."""
        (resized_width, resized_height), (left, top) = placement(self.width, self.height, self.bucket)
        across, down = width / resized_width, height / resized_height
        return (round(left * across), round(top * down), round((left + self.bucket.width) * across),
                round((top + self.bucket.height) * down))


def crop_sheet(shown: Sequence[tuple[Image.Image, Crop, str]]) -> Image.Image:
    """Pictures (RGB, upright) with what is cut off dimmed, the rest framed, and a line of text under each."""
    rows = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * (CELL + LABEL + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, crop, text) in enumerate(shown):
        left, top = GAP + i % COLUMNS * (CELL + GAP), GAP + i // COLUMNS * (CELL + LABEL + GAP)
        small = image.copy()
        small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(_framed(small, crop), (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        pen.text((left, top + CELL + 3), _fitting(pen, text), fill="black")
    return sheet


def _framed(image: Image.Image, crop: Crop) -> Image.Image:
    box = crop.kept(*image.size)
    framed = ImageEnhance.Brightness(image).enhance(DIMMED)
    framed.paste(image.crop(box), box[:2])
    ImageDraw.Draw(framed).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=EDGE)
    return framed


def _fitting(pen: ImageDraw.ImageDraw, text: str) -> str:
    """The text without its middle where the cell is too narrow for all of it."""
    shown, cut = text, len(text)
    while pen.textlength(shown) > CELL and cut > 2:
        cut -= 1
        shown = f"{text[: cut // 2]}…{text[len(text) - cut // 2 :]}"
    return shown
