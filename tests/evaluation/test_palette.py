"""Colour match: the background of a picture, named in the palette's words."""

import pytest
from PIL import Image, ImageDraw

from components.evaluation.palette import asked_colour, background, nearest_colour

PALETTE = {"red": (217, 45, 52), "green": (46, 158, 91), "blue": (38, 115, 201)}


@pytest.mark.parametrize("colour", PALETTE)
@pytest.mark.parametrize("side", [64, 256])
def test_the_ring_sees_the_ground_of_a_rounded_square_and_not_its_glyph(colour: str, side: int):
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((side * 0.03, side * 0.03, side * 0.97, side * 0.97), radius=side * 0.2, fill=PALETTE[colour])
    pen.ellipse((side * 0.2, side * 0.2, side * 0.8, side * 0.8), fill="white")
    assert background(image) == PALETTE[colour]
    assert nearest_colour(background(image), PALETTE) == colour


def test_a_prompt_asks_for_the_one_colour_it_names():
    assert asked_colour("red rocket, app icon style", PALETTE) == "red"
    assert asked_colour("Blue whale", PALETTE) == "blue"
    assert asked_colour("a red and green parrot", PALETTE) is None
    assert asked_colour("bored walrus", PALETTE) is None
