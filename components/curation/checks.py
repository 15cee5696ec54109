"""What is checked on every image and caption: facts from one decode, then a table of small rules over the facts.

`examine` reads pixels and is worth caching (its result depends on the bytes and on EXAMINE_VERSION alone); `judge` and
`judge_set` only compare numbers, so rules change without touching an image. A check never deletes: it rejects or flags,
with score, threshold and a reason.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageStat

from components.config import CurationConfig
from components.curation.duplicates import dhash, phash
from components.curation.looks import Look
from components.curation.pixels import NOTES, WHITE, UnreadableImage, read_image, rgb_digest
from components.curation.profiles import PHOTO, PROFILES, Profile, Thresholds, ToldProfile

EXAMINE_VERSION = 4
REDUCED_SIDE = 256            # px, about, of the shorter side of the copy that hashes and figures are read off
REDUCED_PIXELS = 2**20        # and of at most about this many pixels, however long and thin it is
EDGE_SIDE = 64                # px, of the second look at sharpness
PERCEIVED = np.array([0.241, 0.691, 0.068], np.float32)   # of squared R, G, B, as cleanlab/cleanvision has it
USUAL_MIN_SIDE = 200          # px, DataComp's filter; a base that trains on smaller pictures lowers it
DRAWN_ENTROPY = 6.0           # bits; photographs have 7 to 9.5, flat drawings and icons 1 to 5
FLAT = 5.0                    # of 255, contrast below which nothing can be told about sharpness
IDENTICAL_CAPTIONS = 0.2      # share of captions that repeat another one, above which the set is flagged
MIN_SET = 50                  # images; below, nothing is said about an image's place in the set
LOOKED_AT = 64                # pictures of a drawn set that tell its kind
ICON_SIDE, ICON_ASPECT = 256, 1.1          # px and ratio up to which a drawing is an icon
PIXEL_ART_SIDE, PIXEL_ART_COLOURS = 128, 32   # up to which it is pixel art of its own size; icons' soft edges have more


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """One decoded image, upright. Brightness is perceived, 0 black to 1 white."""

    rgb_digest: str                            # of size and RGB pixels: the same picture in any container
    width: int
    height: int
    format: str                                # "PNG", "JPEG", ...
    mode: str                                  # Pillow mode of the stored pixels
    notes: tuple[str, ...]                     # keys of pixels.NOTES: what was done to the pixels
    phash: int                                 # 64 bits, as are dhash's; within 2 bits of phash(full image)
    dhash: int
    mean_colour: tuple[float, float, float]    # R, G, B in 0 to 255
    brightness: tuple[float, float, float, float, float]   # percentiles 1, 5, 50, 95, 99
    entropy: float                             # bits, of the RGB histogram
    sharpness: float                           # variance of the Laplacian, at 256 px
    edges: float                               # standard deviation of the edges, at 64 px


@dataclass(frozen=True, slots=True)
class Unreadable:
    reason: str                                # one line


@dataclass(frozen=True, slots=True)
class CheckRules:
    """What the thresholds depend on."""

    training_size: int                         # px, side that the base model is trained on
    min_side: int                              # px
    max_aspect: float
    min_caption_words: int
    thresholds: Thresholds = PHOTO             # of the set's profile
    licences: tuple[str, ...] | None = None    # SPDX ids that are allowed; None: any, or none stated


@dataclass(frozen=True, slots=True)
class Verdict:
    check: str
    score: float | None
    threshold: float | None
    decision: Literal["keep", "reject", "flag"]
    reason: str                                # one sentence, also for what is kept
    version: str = "1"                         # of the rule, or the revision of the model that gave the score


@dataclass(frozen=True, slots=True)
class Check:
    """One rule. It fails when the score is below (or above) the threshold; `says` is filled with both.

    Without a threshold it is not applied.
    """

    name: str
    version: int
    decision: Literal["reject", "flag"]
    fails: Literal["below", "above"]
    threshold: Callable[[CheckRules], float | None]
    score: Callable[[ImageFacts, str, CheckRules], float]
    says: str

    def __call__(self, facts: ImageFacts, caption: str, rules: CheckRules, *, passed: bool) -> Verdict | None:
        limit = self.threshold(rules)
        if limit is None:
            return None
        score, threshold = float(self.score(facts, caption, rules)), float(limit)
        failed = score < threshold if self.fails == "below" else score > threshold
        if not (failed or passed):
            return None
        said = self.says.format(score=score, threshold=threshold, facts=facts, notes=_said_of(facts))
        return Verdict(self.name, score, threshold, self.decision if failed else "keep", said, str(self.version))


def noted(*notes: str) -> Callable[[ImageFacts, str, CheckRules], float]:
    return lambda facts, caption, rules: sum(note in facts.notes for note in notes)


THRESHOLDS = frozenset(f.name for f in fields(Thresholds))   # checks whose threshold a recipe can name

CHECKS: tuple[Check, ...] = (
    Check("tiny", 1, "reject", "below", lambda rules: rules.min_side,
          lambda facts, caption, rules: min(facts.width, facts.height),
          "The shorter side has {score:.0f} px, at least {threshold:.0f} are needed."),
    Check("aspect", 1, "reject", "above", lambda rules: rules.max_aspect,
          lambda facts, caption, rules: max(facts.width, facts.height) / min(facts.width, facts.height),
          "{facts.width} x {facts.height} px is {score:.2f} to 1, at most {threshold:g} to 1 is used."),
    Check("small", 1, "flag", "below", lambda rules: rules.training_size,
          lambda facts, caption, rules: min(facts.width, facts.height),
          "The shorter side has {score:.0f} px, training uses {threshold:.0f}: smaller ones are scaled up."),
    Check("upscaled", 1, "flag", "above", lambda rules: rules.thresholds.upscaled,
          lambda facts, caption, rules: rules.training_size / min(facts.width, facts.height),
          "Training scales it up {score:.2f} times, above {threshold:g} detail is missing."),
    Check("dark", 1, "flag", "below", lambda rules: rules.thresholds.dark,
          lambda facts, caption, rules: facts.brightness[4],
          "Its brightest parts have brightness {score:.2f}, below {threshold:g} it is dark."),
    Check("bright", 1, "flag", "above", lambda rules: rules.thresholds.bright,
          lambda facts, caption, rules: facts.brightness[1],
          "Its darkest parts have brightness {score:.2f}, above {threshold:g} it is washed out."),
    Check("low_information", 1, "flag", "below", lambda rules: rules.thresholds.low_information,
          lambda facts, caption, rules: facts.entropy,
          "Its colours hold {score:.2f} bits, below {threshold:g} there is little to see."),
    Check("frames", 1, "flag", "above", lambda rules: 0, noted("animated", "multipage"), "{notes}"),
    Check("colours", 1, "flag", "above", lambda rules: 0, noted("cmyk", "16bit", "profile_ignored"), "{notes}"),
    Check("metadata", 1, "flag", "above", lambda rules: 0, noted("gps", "metadata_damaged"), "{notes}"),
    Check("caption_empty", 1, "reject", "below", lambda rules: 1,
          lambda facts, caption, rules: len(caption.strip()),
          "The caption has {score:.0f} characters."),
    Check("caption_short", 1, "flag", "below", lambda rules: rules.min_caption_words,
          lambda facts, caption, rules: len(caption.split()),
          "The caption has {score:.0f} words, at least {threshold:.0f} are asked for."),
)


def check_rules(config: CurationConfig, training_size: int, *, profile: Profile = "photo") -> CheckRules:
    """The recipe's rules for a base that trains at `training_size` px; thresholds it names go before its profile's."""
    own = {name: check.threshold for name, check in config.judged().items() if name in THRESHOLDS}
    min_side = min(USUAL_MIN_SIDE, training_size) if config.min_side == "auto" else config.min_side
    return CheckRules(training_size=training_size, min_side=min_side, max_aspect=config.max_aspect,
                      thresholds=replace(PROFILES[profile], **own), min_caption_words=config.min_caption_words,
                      licences=config.licences)


def examine(data: bytes, background: tuple[int, int, int] = WHITE) -> ImageFacts | Unreadable:
    """Everything the checks need, from one decode of an image file's bytes. Never raises for what the bytes are."""
    try:
        decoded = read_image(data, background)
    except UnreadableImage as error:
        return Unreadable(str(error))
    image = decoded.image
    reduced = _reduced(image)
    grey = reduced.convert("L")
    rgb = np.asarray(reduced, dtype=np.float32)                          # (h, w, 3)
    red, green, blue = np.round(ImageStat.Stat(reduced).mean, 3).tolist()
    p1, p5, p50, p95, p99 = _percentiles(_perceived_brightness(rgb), (1, 5, 50, 95, 99)).round(5).tolist()
    return ImageFacts(
        rgb_digest=rgb_digest(image), width=image.width, height=image.height, format=decoded.format, mode=decoded.mode,
        notes=decoded.notes, phash=phash(grey), dhash=dhash(grey), mean_colour=(red, green, blue),
        brightness=(p1, p5, p50, p95, p99), entropy=round(reduced.entropy(), 5),
        sharpness=_laplacian_variance(grey), edges=_edge_deviation(grey),
    )


def judge(facts: ImageFacts | Unreadable, caption: str, rules: CheckRules, *, passed: bool = True) -> list[Verdict]:
    """Every check's verdict on one image and its caption, those that it passed too unless `passed` is False.

    An unreadable file has this one only.
    """
    if isinstance(facts, Unreadable):
        return [Verdict("unreadable", None, None, "reject", f"It cannot be opened: {facts.reason}.")]
    return [verdict for check in CHECKS if (verdict := check(facts, caption, rules, passed=passed)) is not None]


def judge_licence(licence: str | None, rules: CheckRules) -> Verdict | None:
    """A reject for a picture whose licence is not among those allowed, whatever the case of its letters, or None."""
    if rules.licences is None or (licence or "").casefold() in {allowed.casefold() for allowed in rules.licences}:
        return None
    found = f"Its licence is {licence}" if licence else "It states no licence"
    return Verdict("licence", None, None, "reject", f"{found}; the recipe allows {', '.join(rules.licences)}.")


def judge_set(facts: Sequence[ImageFacts], thresholds: Thresholds) -> list[list[Verdict]]:
    """Flags for images that stand out from their own set, one list per image; empty below 50 images.

    Brightness far from the set's median (robust z, in sets of any kind), and in photographs sharpness far below it.
    """
    verdicts: list[list[Verdict]] = [[] for _ in facts]
    if len(facts) < MIN_SET:
        return verdicts
    z, limit = robust_z(np.array([f.brightness[2] for f in facts])), thresholds.unusual_brightness
    for i in np.flatnonzero(np.abs(z) > limit).tolist():
        verdicts[i].append(Verdict("unusual_brightness", float(z[i]), limit, "flag",
                                   f"Its brightness is {z[i]:+.1f} deviations from this set's median."))
    if thresholds.blur is not None:
        sharp = np.array([_relative_sharpness(f) for f in facts])
        shown = np.flatnonzero(~np.isnan(sharp))
        z = robust_z(sharp[shown]) if len(shown) else sharp
        for i, score in zip(shown.tolist(), z.tolist(), strict=True):
            if score < thresholds.blur:
                verdicts[i].append(Verdict("blur", score, thresholds.blur, "flag",
                                           f"Its sharpness is {score:+.1f} deviations from this set's median."))
    return verdicts


def judge_captions(captions: Sequence[str]) -> Verdict:
    """One verdict on the whole set: identical captions blur what is learnt and make copying likelier."""
    counts = Counter(" ".join(caption.lower().split()) for caption in captions)
    share = sum(count for count in counts.values() if count > 1) / max(len(captions), 1)
    return Verdict("identical_captions", share, IDENTICAL_CAPTIONS, "flag" if share > IDENTICAL_CAPTIONS else "keep",
                   f"{share:.0%} of the captions are shared by several images.")


def is_drawn(facts: Sequence[ImageFacts]) -> bool:
    """Whether the set is drawn, by the median entropy of its colours: thresholds for photographs misjudge drawings."""
    return bool(facts) and float(np.median([f.entropy for f in facts])) < DRAWN_ENTROPY


def looked_at(facts: Sequence[ImageFacts]) -> list[ImageFacts]:
    """The pictures whose look tells which kind of drawings a set has: drawn ones of the lowest digests, none twice."""
    if not is_drawn(facts):
        return []
    distinct = {f.rgb_digest: f for f in facts if f.entropy < DRAWN_ENTROPY}
    return [distinct[digest] for digest in sorted(distinct)[:LOOKED_AT]]


def tell_profile(facts: Sequence[ImageFacts], looks: Mapping[str, Look]) -> ToldProfile:
    """What a set is made of. `looks` holds the look of each picture of `looked_at(facts)`, by the pixels' digest."""
    seen = looked_at(facts)
    if not seen:
        share = float(np.mean([f.entropy >= DRAWN_ENTROPY for f in facts])) if facts else 0.0
        return ToldProfile("photo", share, f"{share:.0%} of the pictures have the colours of photographs.")
    drawn = float(np.mean([f.entropy < DRAWN_ENTROPY for f in facts]))
    kinds: Counter[Profile] = Counter(_drawn_kind(f, looks[f.rgb_digest]) for f in seen)
    [(profile, votes)] = kinds.most_common(1)
    why = f"{drawn:.0%} of the pictures are drawn; of {len(seen)} looked at {votes} {_LOOK_LIKE[profile]}."
    return ToldProfile(profile, drawn * votes / len(seen), why)


def _drawn_kind(facts: ImageFacts, look: Look) -> Profile:
    longer, shorter = max(facts.width, facts.height), min(facts.width, facts.height)
    if look.grid > 1 or (look.colours <= PIXEL_ART_COLOURS and longer <= PIXEL_ART_SIDE):
        return "pixel_art"
    return "icon" if longer <= ICON_SIDE and longer <= ICON_ASPECT * shorter else "illustration"


_LOOK_LIKE: Mapping[Profile, str] = {
    "pixel_art": "have a grid of pixels or few colours",
    "icon": "are small and square",
    "illustration": "are larger or oblong",
}


def robust_z(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(value - median) / (1.4826 median absolute deviation), (n,); zeros when half of the values are equal."""
    deviation = values - np.median(values)
    spread = 1.4826 * np.median(np.abs(deviation))
    return deviation / spread if spread > 0 else np.zeros_like(deviation)


def _relative_sharpness(facts: ImageFacts) -> float:
    """Logarithm of the sharpness that contrast does not explain; NaN where there is too little contrast to tell."""
    contrast = 255 * (facts.brightness[3] - facts.brightness[1])
    return float(np.log(max(facts.sharpness, 1e-6) / contrast**2)) if contrast > FLAT else float("nan")


def _reduced(image: Image.Image) -> Image.Image:
    """A copy for hashes and figures: blocks of pixels averaged, as long as no side falls much below 256 px.

    A long and thin picture comes down to REDUCED_PIXELS.
    """
    sides = max(image.size) // REDUCED_SIDE, round(min(image.size) / REDUCED_SIDE)
    return image.reduce(max(1, min(sides), isqrt(image.width * image.height // REDUCED_PIXELS)))


def _percentiles(values: NDArray[np.floating], percents: Sequence[float]) -> NDArray[np.float64]:
    """`np.percentile` by one sort, in a third of its time."""
    ordered = np.sort(values, axis=None)
    at = np.asarray(percents) / 100 * (len(ordered) - 1)
    below = np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def _perceived_brightness(rgb: NDArray[np.float32]) -> NDArray[np.floating]:
    """(h, w, 3) in 0 to 255 -> (h, w) in 0 to 1."""
    return np.sqrt(np.square(rgb) @ PERCEIVED) / np.float32(255)


def _laplacian_variance(grey: Image.Image) -> float:
    x = np.asarray(_within(grey, REDUCED_SIDE)).astype(np.int16)
    if min(x.shape) < 3:
        return 0.0
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    return float(laplacian.astype(np.float32).var())


def _edge_deviation(grey: Image.Image) -> float:
    return float(ImageStat.Stat(_within(grey, EDGE_SIDE).filter(ImageFilter.FIND_EDGES)).stddev[0])


def _within(image: Image.Image, side: int) -> Image.Image:
    scaled = image.copy()
    scaled.thumbnail((side, side), Image.Resampling.BOX)
    return scaled


def _said_of(facts: ImageFacts) -> str:
    said = "; ".join(NOTES[note] for note in facts.notes) or "nothing unusual about the file"
    return f"{said[0].upper()}{said[1:]}."
