import colorsys

import pytest
import torch

from components.demo.emoji import HUES
from components.training.captions import caption
from components.training.pictures import TINTS, Picture, in_color, in_stencil, stencilled, tinted

ROCKET = Picture("noto-1f680.png", "rocket", ("space ship",), "noto", "blue", True, "1f680")
BLUE_HEART = Picture("noto-1f499.png", "blue heart", (), "noto", "blue", True, "1f499")


@pytest.mark.parametrize("color", TINTS)
def test_paper_stays_white_and_every_hue_takes_the_colour_asked_for(color: str):
    drawing = torch.tensor([[255, 255, 255], [230, 40, 40], [250, 210, 30], [30, 60, 200], [120, 120, 120]])
    pixels = drawing.to(torch.uint8).T.reshape(1, 3, 1, 5)
    result = tinted(pixels, color)[0, :, 0].T.tolist()
    assert result[0] == [255, 255, 255]
    for red, green, blue in result[1:]:
        hue = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)[0] * 360
        assert any(low <= hue <= high for low, high, word in HUES if word == color), (color, hue)


def test_a_darker_pixel_stays_darker():
    grays = torch.arange(0, 256, dtype=torch.uint8).reshape(1, 1, 1, 256).expand(1, 3, 1, 256)
    brightness = tinted(grays, "green").float().mean(1).flatten()
    assert (brightness.diff() >= 0).all()
    assert brightness[0] < brightness[128] < brightness[255]


def test_the_caption_of_a_tinted_drawing_names_its_colour_whatever_wording_is_drawn():
    captions = {caption(in_color(ROCKET, "pink"), wording / 50, 0.9) for wording in range(50)}
    assert captions == {"pink rocket, noto style"}


def test_a_name_that_has_a_colour_is_not_given_a_second_one():
    assert in_color(BLUE_HEART, "red") is BLUE_HEART


def test_a_stencil_is_white_where_there_was_ink_with_the_darkest_parts_cut_out():
    drawing = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    drawing[..., 16:48, 16:48] = torch.tensor((250, 210, 30), dtype=torch.uint8).view(3, 1, 1)
    drawing[..., 28:36, 28:36] = 20
    result = stencilled(drawing, "blue").float() / 255
    white, ground = (result > 0.99).all(1)[0], ((result - torch.tensor(TINTS["blue"]).view(3, 1, 1)).abs() < 0.01)
    assert ground.all(1)[0, :18].all()
    assert ground.all(1)[0, 30:34, 30:34].all(), "the dark square is a hole"
    assert white[22:28, 22:42].all()
    assert int(white.sum()) == 24 * 24 - 6 * 6, "three quarters of the size in each direction"


def test_the_caption_of_a_stencil_always_says_so():
    captions = {caption(in_stencil(ROCKET, "pink"), wording / 50, s) for wording in range(50) for s in (0.0, 0.9)}
    assert captions == {"pink rocket stencil", "pink rocket stencil, noto style"}
    assert in_stencil(BLUE_HEART, "red") is BLUE_HEART
