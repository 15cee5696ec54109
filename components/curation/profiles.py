"""What a set is made of, and the thresholds that fit it: a white ground is a fault of a photograph, not of an icon."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

Profile = Literal["photo", "illustration", "pixel_art", "icon"]

SINGLE_COLOUR_BITS = 1.585   # log2(3): a picture of one colour has one value in each of three channels


@dataclass(frozen=True, slots=True)
class Thresholds:
    """One number per check; None: the check says nothing about such pictures."""

    dark: float | None               # perceived brightness, 0 to 1, that 99 % of the pixels stay below
    bright: float | None             # perceived brightness that 95 % of the pixels are above
    low_information: float | None    # bits of the colours' histogram
    upscaled: float | None           # times that training enlarges a picture
    blur: float | None               # robust deviations from the set's median sharpness, as a logarithm
    unusual_brightness: float        # robust deviations from the set's median
    unlike_others: float             # robust deviations from the set's median distance to 5 neighbours
    same_picture: float | None       # correlation of 16 x 16 copies that near duplicates by hash must reach as well
    brightness_gain: float           # up to which one near duplicate may be brighter than the other


PHOTO = Thresholds(   # dark, bright and low_information are cleanlab/cleanvision's
    dark=0.32, bright=0.95, low_information=3.0, upscaled=1.3, blur=-3.5, unusual_brightness=3.5, unlike_others=3.5,
    same_picture=None, brightness_gain=1.25)
_DRAWN = replace(   # recoded and rescaled drawings correlate by 0.99; another shade is another drawing
    PHOTO, dark=None, bright=None, low_information=SINGLE_COLOUR_BITS + 0.02, blur=None, same_picture=0.98,
    brightness_gain=1.0)
PROFILES: Mapping[Profile, Thresholds] = MappingProxyType({
    "photo": PHOTO,
    "illustration": replace(_DRAWN, dark=0.1, bright=0.995, low_information=2.0),
    "pixel_art": replace(_DRAWN, upscaled=None, same_picture=0.995),   # frames of a walk differ in a few pixels
    "icon": _DRAWN,
})


@dataclass(frozen=True, slots=True)
class ToldProfile:
    """A profile with how it was come by."""

    profile: Profile
    share: float      # of the pictures looked at, those that speak for it; 1 where the recipe names it
    why: str          # one sentence
