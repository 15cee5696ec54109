"""What comes off pictures on the way to their buckets: shares and scales by closed form, and a sheet of the worst."""

import numpy as np
import pytest
from PIL import Image

from components.latents.buckets import Bucket, contain, cover, fit
from components.latents.crops import CELL, COLUMNS, DIMMED, GAP, PADDING, TITLE, Crop, crop_sheet
from components.latents.saliency import salient_corner

SQUARE = Bucket(64, 64)


@pytest.mark.parametrize(
    ("size", "share", "scale"),
    [((64, 64), 0.0, 1.0), ((128, 64), 0.5, 1.0), ((32, 32), 0.0, 2.0), ((60, 240), 0.75, 64 / 60)],
)
def test_share_and_scale_are_those_of_covering_the_bucket(size: tuple[int, int], share: float, scale: float):
    crop = Crop(*size, cover(*size, SQUARE))
    assert crop.share == pytest.approx(share) and crop.scale == pytest.approx(scale) and crop.padding == 0


def test_padding_cuts_nothing_and_costs_a_share_of_the_bucket():
    crop = Crop(128, 64, contain(128, 64, SQUARE))
    assert (crop.share, crop.padding, crop.loss, crop.scale) == (0, 0.5, 0.5, 0.5)
    assert crop.window(128, 64) == (0, -32, 128, 96)


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (300, 200), (50, 90)])
def test_what_is_kept_of_a_picture_is_what_training_sees(size: tuple[int, int]):
    width, height = size
    columns = np.broadcast_to(np.arange(width) * 255 // width, (height, width))
    lines = np.broadcast_to((np.arange(height) * 255 // height)[:, None], (height, width))
    image = Image.fromarray(np.stack([columns, lines, lines], axis=-1).astype(np.uint8))
    crop = Crop(width, height, cover(width, height, SQUARE))
    left, top, right, bottom = crop.window(width, height)
    seen = np.asarray(fit(image, crop.placement), dtype=float)
    kept = np.asarray(image.crop((left, top, right, bottom)).resize((64, 64), Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(seen - kept).mean() < 3


def test_the_sheet_dims_what_is_cut_off_and_has_a_cell_for_each_picture():
    white = Image.new("RGB", (400, 200), "white")
    cut, padded = Crop(400, 200, cover(400, 200, SQUARE)), Crop(400, 200, contain(400, 200, SQUARE))
    sheet = crop_sheet([(white, cut, f"{'long' * 20} {i}.png") for i in range(7)], "the worst " * 50)
    assert sheet.width == COLUMNS * (CELL + GAP) + GAP
    middle, line = GAP + CELL // 2, TITLE + GAP + CELL - CELL // 4
    assert sheet.getpixel((middle, line)) == (255, 255, 255)
    assert sheet.getpixel((GAP + 4, line)) == (int(255 * DIMMED),) * 3
    alone = crop_sheet([(white, padded, "one")], "one")
    assert alone.width == CELL + 2 * GAP
    assert alone.getpixel((middle, TITLE + GAP + CELL // 2)) == (255, 255, 255)
    assert alone.getpixel((middle, TITLE + GAP + CELL // 8)) == PADDING


# where the subject is ---------------------------------------------------------------------------------------------


def scene(width: int, height: int, at: tuple[int, int], side: int = 40) -> Image.Image:
    """A grey ground with a little noise and a striped red square on it."""
    noise = np.random.default_rng(0).integers(0, 12, (height, width, 1))
    pixels = np.broadcast_to(120 + noise, (height, width, 3)).astype(np.uint8)
    left, top = at
    pixels[top : top + side, left : left + side] = (220, 30, 30)
    pixels[top : top + side : 6, left : left + side] = (250, 250, 250)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("at", [10, 130, 250, 340])
@pytest.mark.parametrize("upright", [False, True])
def test_the_window_follows_the_subject_which_the_centre_may_miss(at: int, upright: bool):
    image = scene(100, 400, (30, at)) if upright else scene(400, 100, (at, 30))
    placement = cover(*image.size, SQUARE).at(salient_corner(image, cover(*image.size, SQUARE)))
    left, top, right, bottom = Crop(*image.size, placement).window(*image.size)
    near, far = (top, bottom) if upright else (left, right)
    assert near <= at and at + 40 <= far
    assert (right - left, bottom - top) == (100, 100) and (left if upright else top) == 0
    assert at < 150 or at + 40 > 250  # the centre would have cut it


@pytest.mark.parametrize("size", [(400, 100), (100, 400), (101, 64), (64, 64), (1001, 37)])
def test_without_a_subject_the_window_is_in_the_centre(size: tuple[int, int]):
    flat = Image.new("RGB", size, (90, 120, 200))
    placement = cover(*size, SQUARE)
    assert placement.at(salient_corner(flat, placement)) == placement


def test_of_equal_windows_the_nearest_to_the_centre_is_taken_and_of_two_the_left():
    ground = Image.new("RGB", (400, 100), (120, 120, 120))
    one = ground.copy()
    one.paste((220, 30, 30), (60, 40, 80, 60))
    left, _ = salient_corner(one, cover(400, 100, SQUARE))
    assert 60 - 30 <= left / 0.64 <= 60 - 20  # near its left edge, where it still counts in full
    two = one.copy()
    two.paste(one.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((200, 0, 400, 100)), (200, 0))
    assert salient_corner(two, cover(400, 100, SQUARE)) == (left, 0)


def test_a_mask_is_cut_where_its_picture_is_whatever_the_kind_of_crop():
    """The mask is drawn into the picture, in red: after fitting, both still say the same."""
    image = scene(400, 100, (300, 30))
    mask = Image.fromarray((np.asarray(image)[:, :, 0] > 200).astype(np.uint8) * 255).convert("RGB")
    for placement in (
        cover(400, 100, SQUARE),
        cover(400, 100, SQUARE).at(salient_corner(image, cover(400, 100, SQUARE))),
        contain(400, 100, SQUARE),
    ):
        said = np.asarray(fit(mask, placement, (0, 0, 0)))[:, :, 0] > 127
        drawn = np.asarray(fit(image, placement, (0, 0, 0)))[:, :, 0] > 180
        assert (said != drawn).mean() < 0.02
        assert said.any() or placement == cover(400, 100, SQUARE)
