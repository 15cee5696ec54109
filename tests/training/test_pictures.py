import colorsys

import pytest
import torch

from components.demo.emoji import HUES
from components.training.captions import caption
from components.training.pictures import TINTS, Picture, in_color, tinted

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
