"""Facts come from one decode; rules are small, replayable and say what they saw."""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from components.config import CurationConfig
from components.curation.checks import (
    CHECKS,
    CheckRules,
    ImageFacts,
    Unreadable,
    Verdict,
    check_rules,
    examine,
    judge,
    judge_captions,
    judge_set,
    tell_profile,
)
from components.curation.duplicates import dhash, phash
from components.curation.looks import look_at
from components.curation.profiles import PHOTO, PROFILES, ToldProfile

RULES = check_rules(CurationConfig(), training_size=512)


@cache
def photo(seed: int = 0, size: tuple[int, int] = (560, 520), blur: float = 0.0) -> Image.Image:
    """Noise at several scales has the entropy and the sharpness of a photograph."""
    g = np.random.default_rng(seed)
    image = Image.new("RGB", size)
    for layer, side in enumerate((3, 9, 40, 200), start=1):
        noise = Image.fromarray(g.integers(0, 256, (side, side, 3), dtype=np.uint8))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), 1 / layer)
    return image.filter(ImageFilter.GaussianBlur(blur))


def bmp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


def facts_of(image: Image.Image) -> ImageFacts:
    found = examine(bmp(image))
    assert isinstance(found, ImageFacts)
    return found


@cache
def good() -> ImageFacts:
    return facts_of(photo())


def failed(facts: ImageFacts | Unreadable, caption: str = "a red bicycle", rules: CheckRules = RULES) -> dict[str, str]:
    return {verdict.check: verdict.decision for verdict in judge(facts, caption, rules) if verdict.decision != "keep"}


# Facts

def test_facts_say_what_is_in_the_file():
    image = photo(size=(300, 240))
    facts = facts_of(image)
    assert (facts.width, facts.height, facts.format, facts.mode, facts.notes) == (300, 240, "BMP", "RGB", ())
    assert (facts.phash, facts.dhash) == (phash(image), dhash(image))
    assert facts.mean_colour == pytest.approx(np.asarray(image).mean(axis=(0, 1)), abs=1e-3)
    assert list(facts.brightness) == sorted(facts.brightness) and 0 <= facts.brightness[0] <= facts.brightness[-1] <= 1
    assert facts.entropy == pytest.approx(image.entropy(), abs=1e-4)


def test_hashes_of_a_large_image_stay_close_to_those_of_its_full_size():
    for seed in range(4):
        image = photo(seed, size=(1100, 800))
        facts = facts_of(image)
        assert (facts.phash ^ phash(image)).bit_count() <= 2 and (facts.dhash ^ dhash(image)).bit_count() <= 2


def test_brightness_is_perceived_and_black_and_white_are_its_ends():
    ends = [facts_of(Image.new("RGB", (32, 32), colour)).brightness[2] for colour in ("black", "white")]
    assert ends == pytest.approx([0, 1])
    green, blue = (facts_of(Image.new("RGB", (32, 32), colour)).brightness[2] for colour in ("lime", "blue"))
    assert green == pytest.approx(0.691**0.5, abs=1e-4) and blue == pytest.approx(0.068**0.5, abs=1e-4)


def test_blur_lowers_both_measures_of_sharpness():
    found = [facts_of(photo(blur=radius)) for radius in (0, 2, 8)]
    assert found[0].sharpness > found[1].sharpness > found[2].sharpness
    assert found[0].edges > found[2].edges


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 90), (5000, 3), (3, 2_000_000)])
def test_images_of_any_shape_have_facts(size: tuple[int, int]):
    started = time.process_time()
    facts = facts_of(Image.new("RGB", size))
    assert (facts.width, facts.height) == size and facts.sharpness == 0
    assert time.process_time() - started < 2


@pytest.mark.parametrize(("data", "said"), [
    (b"", "empty (0 bytes)"), (b"a caption in a .png file", "the file begins with b'a caption"),
    (bmp(Image.new("RGB", (50, 50)))[:-300], "cut short"),
])
def test_a_file_that_cannot_be_opened_is_rejected_with_the_reason(data: bytes, said: str):
    facts = examine(data)
    assert isinstance(facts, Unreadable) and said in facts.reason
    [verdict] = judge(facts, "a caption", RULES)
    assert (verdict.check, verdict.decision, verdict.score) == ("unreadable", "reject", None)
    assert said in verdict.reason and "\n" not in verdict.reason


# Rules for one image

def test_a_good_photograph_passes_every_check():
    verdicts = judge(good(), "a red bicycle", RULES)
    assert {verdict.decision for verdict in verdicts} == {"keep"}
    assert [verdict.check for verdict in verdicts] == [check.name for check in CHECKS]


def test_a_base_of_64_px_takes_images_of_64_px():
    small = check_rules(CurationConfig(), training_size=64)
    icon = facts_of(photo(size=(64, 64)))
    assert small.min_side == 64 and failed(icon, rules=small) == {}
    assert failed(icon) == {"tiny": "reject", "small": "flag", "upscaled": "flag"}
    assert failed(facts_of(photo(size=(63, 64))), rules=small) == {"tiny": "reject", "small": "flag"}


@pytest.mark.parametrize(("size", "expected"), [
    ((512, 512), {}), ((511, 600), {"small": "flag"}), ((393, 600), {"small": "flag", "upscaled": "flag"}),
    ((199, 199), {"tiny": "reject", "small": "flag", "upscaled": "flag"}),
    ((1536, 512), {}), ((1537, 512), {"aspect": "reject"}), ((512, 1600), {"aspect": "reject"}),
])
def test_size_and_shape_follow_the_training_size(size: tuple[int, int], expected: dict[str, str]):
    facts = replace(good(), width=size[0], height=size[1])
    assert failed(facts) == expected


def test_the_recipe_sets_the_smallest_side_and_the_shape():
    rules = check_rules(CurationConfig(min_side=100, max_aspect=1.5), training_size=512)
    facts = replace(good(), width=900, height=512)
    assert failed(facts, rules=rules) == {"aspect": "reject"}
    assert "tiny" not in failed(replace(facts, width=150, height=120), rules=rules)


def test_dark_bright_and_empty_photographs_are_flagged_but_drawings_may_be_so():
    dark = photo().point(lambda v: v // 8)
    bright = photo().point(lambda v: 248 + v // 32)
    plain = Image.new("RGB", (600, 600), (90, 90, 200))
    assert failed(facts_of(dark)) == {"dark": "flag"}
    assert failed(facts_of(bright)) == {"bright": "flag"}
    assert failed(facts_of(plain)) == {"low_information": "flag"}
    icons = replace(RULES, thresholds=PROFILES["icon"])
    assert [failed(facts_of(image), rules=icons) for image in (dark, bright)] == [{}, {}]
    assert failed(facts_of(plain), rules=icons) == {"low_information": "flag"}   # one colour is no drawing either


@pytest.mark.parametrize(("note", "check"), [
    ("animated", "frames"), ("multipage", "frames"), ("cmyk", "colours"), ("16bit", "colours"),
    ("profile_ignored", "colours"), ("gps", "metadata"), ("metadata_damaged", "metadata"),
])
def test_unusual_files_are_flagged_with_what_was_done(note: str, check: str):
    facts = replace(good(), notes=(note,))
    assert failed(facts) == {check: "flag"}
    recorded = ("transparent", "rotated", "palette", "profile")
    assert failed(replace(facts, notes=recorded)) == {}


# Rules for one caption

@pytest.mark.parametrize(("caption", "expected"), [
    ("cat", {}), ("", {"caption_empty": "reject", "caption_short": "flag"}),
    (" \n", {"caption_empty": "reject", "caption_short": "flag"}),
])
def test_a_caption_must_say_something(caption: str, expected: dict[str, str]):
    assert failed(good(), caption) == expected


def test_a_short_caption_is_flagged_when_the_recipe_asks_for_more_words():
    rules = check_rules(CurationConfig(min_caption_words=3), training_size=512)
    assert failed(good(), "red bicycle", rules) == {"caption_short": "flag"}
    assert failed(good(), "a red bicycle", rules) == {}


def test_a_verdict_says_the_score_and_the_threshold():
    verdicts = {verdict.check: verdict for verdict in judge(facts_of(photo(size=(700, 100))), "x", RULES)}
    assert verdicts["tiny"] == Verdict("tiny", 100, 200, "reject",
                                       "The shorter side has 100 px, at least 200 are needed.")
    assert verdicts["aspect"].reason == "700 x 100 px is 7.00 to 1, at most 3 to 1 is used."


# Rules for the whole set

def test_blurred_photographs_of_a_set_are_flagged_and_neither_dark_flat_nor_drawn_ones():
    facts = [facts_of(photo(seed, size=(80, 80), blur=6 if seed in (3, 40) else 0)) for seed in range(100)]
    flagged = {i for i, verdicts in enumerate(judge_set(facts, PHOTO)) for v in verdicts if v.check == "blur"}
    assert flagged == {3, 40}
    flat = facts_of(Image.new("RGB", (80, 80), "grey"))
    dim = [facts_of(photo(seed, size=(80, 80)).point(lambda value: value // 6)) for seed in range(2)]
    assert not any(v.check == "blur" for verdicts in judge_set([*facts, flat, *dim], PHOTO)[100:] for v in verdicts)
    assert not any(v.check == "blur" for verdicts in judge_set(facts, PROFILES["icon"]) for v in verdicts)
    assert judge_set(facts[:49], PHOTO) == [[]] * 49


def test_an_image_far_from_its_sets_brightness_is_flagged():
    usual = facts_of(photo(size=(80, 80)))
    g = np.random.default_rng(0)
    facts = [replace(usual, brightness=(0, 0, value, 1, 1)) for value in (0.5 + 0.02 * g.normal(size=60)).tolist()]
    facts[7] = replace(usual, brightness=(0, 0, 0.9, 1, 1))
    flagged = [i for i, verdicts in enumerate(judge_set(facts, PROFILES["icon"])) if verdicts]
    assert flagged == [7]


def test_the_share_of_identical_captions_is_judged_after_normalising():
    assert judge_captions(["a cat", "A  Cat", "a dog", "a cow", "a hen"]).score == pytest.approx(0.4)
    assert judge_captions(["a cat", "A  Cat", "a dog"]).decision == "flag"
    assert judge_captions([f"caption {i}" for i in range(9)] + ["caption 0"]).decision == "keep"
    assert judge_captions([]).decision == "keep"


# What a set is made of

def sprite(seed: int) -> Image.Image:
    """Pixel art of its own size: 24 x 24, twelve colours, mirrored."""
    g = np.random.default_rng(seed)
    half = g.integers(0, 12, (24, 12))
    return Image.fromarray(g.integers(0, 256, (12, 3), dtype=np.uint8)[np.hstack([half, half[:, ::-1]])])


def icon(seed: int, side: int = 64) -> Image.Image:
    """A shape with soft edges on a plain ground."""
    g = np.random.default_rng(seed)
    large = Image.new("RGB", (side * 4, side * 4), "white")
    corners = [tuple(corner) for corner in g.integers(0, side * 4, (5, 2)).tolist()]
    ImageDraw.Draw(large).polygon(corners, fill=tuple(g.integers(0, 200, 3).tolist()))
    return large.resize((side, side), Image.Resampling.BICUBIC)


def told(images: list[Image.Image]) -> ToldProfile:
    facts = [facts_of(image) for image in images]
    return tell_profile(facts, {f.rgb_digest: look_at(image) for f, image in zip(facts, images, strict=True)})


@pytest.mark.parametrize(("profile", "draw"), [
    ("photo", lambda seed: photo(seed, size=(80, 80))),
    ("icon", icon),
    ("illustration", lambda seed: icon(seed, side=300)),
    ("illustration", lambda seed: icon(seed).resize((120, 60))),
    ("pixel_art", sprite),
    ("pixel_art", lambda seed: sprite(seed).resize((240, 240), Image.Resampling.NEAREST)),
    ("pixel_art", lambda seed: sprite(seed).resize((168, 168), Image.Resampling.NEAREST).crop((3, 5, 160, 160))),
])
def test_what_a_set_is_made_of_is_told_from_its_pictures(profile: str, draw: Callable[[int], Image.Image]):
    found = told([draw(seed) for seed in range(12)])
    assert (found.profile, found.share) == (profile, 1.0)


def test_a_mixed_set_says_how_many_of_its_pictures_speak_for_the_profile():
    found = told([icon(seed) for seed in range(6)] + [sprite(seed) for seed in range(2)] + [photo(0, size=(80, 80))])
    assert found.profile == "icon" and found.share == pytest.approx(8 / 9 * 6 / 8)
    assert "of 8 looked at 6 are small and square" in found.why
    assert told([]).share == 0


def test_each_profile_has_its_own_thresholds_and_the_recipes_go_before_them():
    night = replace(good(), brightness=(0, 0, 0.05, 0.1, 0.2))
    rules = {profile: check_rules(CurationConfig(), 512, profile=profile) for profile in PROFILES}
    assert [name for name in PROFILES if "dark" in failed(night, rules=rules[name])] == ["photo"]
    own = check_rules(CurationConfig(checks={"dark": 0.25}), 512, profile="icon")
    assert failed(night, rules=own) == {"dark": "flag"}
    assert failed(night, rules=check_rules(CurationConfig(checks={"dark": 0.15}), 512)) == {}
    small = replace(good(), width=210, height=210)
    assert [name for name in PROFILES if "upscaled" in failed(small, rules=rules[name])] == [
        "photo", "illustration", "icon"]
    assert {verdict.version for verdict in judge(good(), "a cat", RULES)} == {"1"}
