"""Colour match: does a picture have the background colour that its prompt asks for?

The background is the median pixel of a ring 8 to 14 % inside the edge, corners left out; the answer is the nearest
colour of a named palette. A prompt asks for a colour when it contains exactly one of the palette's words.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

RING = (0.08, 0.14)  # of the side
CORNER = 0.25  # of the side, left out at each corner
Colour = tuple[int, int, int]


def background(image: Image.Image) -> Colour:
    """Median RGB of the ring; 0-255 each."""
    pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    y, x = np.mgrid[0:height, 0:width]
    v, u = (y + 0.5) / height, (x + 0.5) / width
    depth = np.minimum.reduce([u, 1 - u, v, 1 - v])  # 0 at the edge, 0.5 in the middle
    side = np.minimum(u, 1 - u) > CORNER
    flat = np.minimum(v, 1 - v) > CORNER
    ring = (depth >= RING[0]) & (depth <= RING[1]) & (side | flat)
    red, green, blue = np.median(pixels[ring], axis=0).round().astype(int).tolist()
    return red, green, blue


def nearest_colour(colour: Colour, palette: Mapping[str, Colour]) -> str:
    """The palette's word for a colour, by Euclidean distance in RGB."""
    return min(palette, key=lambda word: sum((a - b) ** 2 for a, b in zip(colour, palette[word], strict=True)))


def asked_colour(prompt: str, palette: Mapping[str, Colour]) -> str | None:
    """The one palette word that a prompt contains, or None when it has none or several."""
    words = set(prompt.lower().replace(",", " ").split())
    asked = [word for word in palette if word in words]
    return asked[0] if len(asked) == 1 else None
