"""What comes off pictures on the way to their buckets: shares and scales by closed form, and a sheet of the worst."""

import numpy as np
import pytest
from PIL import Image

from components.latents.buckets import Bucket, fit
from components.latents.crops import CELL, COLUMNS, GAP, Crop, crop_sheet

SQUARE = Bucket(64, 64)


@pytest.mark.parametrize(
    ("size", "share", "scale"),
    [((64, 64), 0.0, 1.0), ((128, 64), 0.5, 1.0), ((32, 32), 0.0, 2.0), ((60, 240), 0.75, 64 / 60)],
)
def test_share_and_scale_are_those_of_covering_the_bucket(size: tuple[int, int], share: float, scale: float):
    crop = Crop(*size, SQUARE)
    assert crop.share == pytest.approx(share) and crop.scale == pytest.approx(scale)


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (300, 200), (50, 90)])
def test_what_is_kept_of_a_picture_is_what_training_sees(size: tuple[int, int]):
    width, height = size
    columns = np.broadcast_to(np.arange(width) * 255 // width, (height, width))
    lines = np.broadcast_to((np.arange(height) * 255 // height)[:, None], (height, width))
    image = Image.fromarray(np.stack([columns, lines, lines], axis=-1).astype(np.uint8))
    left, top, right, bottom = Crop(width, height, SQUARE).kept(width, height)
    seen = np.asarray(fit(image, SQUARE), dtype=float)
    kept = np.asarray(image.crop((left, top, right, bottom)).resize((64, 64), Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(seen - kept).mean() < 3


def test_the_sheet_dims_what_is_cut_off_and_has_a_cell_for_each_picture():
    white = Image.new("RGB", (400, 200), "white")
    sheet = crop_sheet([(white, Crop(400, 200, SQUARE), f"50% {'long' * 20} {i}.png") for i in range(7)])
    assert sheet.width == COLUMNS * (CELL + GAP) + GAP
    middle = GAP + CELL // 2
    assert sheet.getpixel((middle, middle)) == (255, 255, 255)
    assert max(sheet.getpixel((GAP + 4, middle))) < 100  # pyright: ignore[reportArgumentType]
    assert crop_sheet([(white, Crop(400, 200, SQUARE), "one")]).width == CELL + 2 * GAP
