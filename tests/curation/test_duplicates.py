"""Hashes have ImageHash's bits, joins find what brute force finds, and a near duplicate must pass every rule."""

import time
from itertools import combinations

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from components.curation import joins
from components.curation.duplicates import (
    components_of,
    cosine_pairs,
    dhash,
    duplicate_groups,
    hamming_pairs,
    hash_images,
    near_duplicates,
    phash,
    says_something,
)
from components.errors import BadInput

LIMITS = {"phash_distance": 6, "dhash_distance": 8, "colour_distance": 12.0}


def picture(seed: int, size: tuple[int, int] = (96, 80), mode: str = "RGB") -> Image.Image:
    """Blurred blobs: large shapes, as photographs have."""
    g = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(g.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, r = g.integers(0, size[0]), g.integers(0, size[1]), g.integers(5, 40)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(g.integers(0, 256, 3).tolist()))
    return image.filter(ImageFilter.GaussianBlur(2)).convert(mode)


def near(images: list[Image.Image]) -> list[tuple[int, int]]:
    p, d = hash_images(images)
    colours = [np.asarray(image.convert("RGB")).mean(axis=(0, 1)) for image in images]
    return [tuple(pair) for pair in near_duplicates(p, d, colours, **LIMITS).tolist()]


# Hashes

@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_hashes_have_the_bits_of_imagehash(mode: str):
    for seed in range(12):
        image = picture(seed, size=(20 + 13 * seed, 150 - 9 * seed), mode=mode)
        assert f"{phash(image):016x}" == str(imagehash.phash(image))
        assert f"{dhash(image):016x}" == str(imagehash.dhash(image))


def test_hashes_of_noise_and_of_flat_pictures_have_the_bits_of_imagehash_too():
    g = np.random.default_rng(0)
    images = [Image.fromarray(g.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(200)]
    images += [Image.new("RGB", (10, 10), (v, v, 255 - v)) for v in range(0, 256, 5)]
    images += [Image.linear_gradient("L"), Image.radial_gradient("L")]
    p, d = hash_images(images)
    assert [f"{h:016x}" for h in p.tolist()] == [str(imagehash.phash(image)) for image in images]
    assert [f"{h:016x}" for h in d.tolist()] == [str(imagehash.dhash(image)) for image in images]
    assert [phash(image) for image in images] == p.tolist() and [dhash(image) for image in images] == d.tolist()


def test_blue_and_white_share_every_hash_and_are_no_duplicates():
    blue, white = Image.new("RGB", (64, 64), "blue"), Image.new("RGB", (64, 64), "white")
    assert phash(blue) == phash(white) == 0x8000000000000000
    assert dhash(blue) == dhash(white)
    assert not says_something(np.array([phash(blue)], dtype=np.uint64))[0]
    assert near([blue, white, blue]) == []


# Joins

def planted_hashes(seed: int, n: int) -> list[int]:
    """Random hashes, of which a third are earlier ones with up to 10 bits flipped, and some are equal."""
    g = np.random.default_rng(seed)
    hashes = g.integers(0, 2**64, n, dtype=np.uint64)
    for i in range(0, n, 3):
        flips = g.choice(64, g.integers(0, 11), replace=False)
        hashes[i] = hashes[g.integers(0, n)] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    return hashes.tolist()


def brute_force(hashes: list[int], max_distance: int) -> set[tuple[int, int]]:
    pairs = combinations(range(len(hashes)), 2)
    return {(i, j) for i, j in pairs if (hashes[i] ^ hashes[j]).bit_count() <= max_distance}


@pytest.mark.parametrize("max_distance", range(11))
def test_the_bucket_join_finds_exactly_what_brute_force_finds(max_distance: int, monkeypatch: pytest.MonkeyPatch):
    hashes = planted_hashes(max_distance, 400)
    expected = brute_force(hashes, max_distance)
    assert len(expected) > 5
    for brute_force_up_to in (0, 10_000):
        monkeypatch.setattr(joins, "BRUTE_FORCE_HASHES", brute_force_up_to)
        pairs = hamming_pairs(hashes, max_distance)
        assert [tuple(pair) for pair in pairs.tolist()] == sorted(expected)


def test_the_join_of_many_hashes_finds_every_planted_pair_in_seconds():
    hashes = planted_hashes(1, 50_000)
    started = time.process_time()
    found = {tuple(pair) for pair in hamming_pairs(hashes, 4).tolist()}
    assert time.process_time() - started < 10
    assert all((hashes[i] ^ hashes[j]).bit_count() <= 4 for i, j in found)
    array = np.array(hashes, dtype=np.uint64)
    for i in range(0, 50_000, 997):   # rows against everything
        distance = np.bitwise_count(array ^ array[i])
        distance[i] = 64
        assert set(np.flatnonzero(distance <= 4).tolist()) == {a + b - i for a, b in found if i in (a, b)}


def test_a_folder_of_copies_is_no_billion_pairs_and_stays_one_component():
    hashes = [3] * 60_000 + [1] * 700 + [2**63] * 3
    pairs = hamming_pairs(hashes, 1)
    assert len(pairs) < 62_000
    assert np.bincount(components_of(len(hashes), pairs)).tolist() == [60_700, 3]
    groups = duplicate_groups(len(hashes), hamming_pairs([5] * 600, 0))
    assert [(len(group.members), group.medoid) for group in groups] == [(600, 0)]


def test_nothing_and_one_hash_have_no_pairs_and_a_silly_distance_is_refused():
    assert hamming_pairs([], 6).shape == hamming_pairs([7], 6).shape == (0, 2)
    assert hamming_pairs([7, 7], 0).tolist() == [[0, 1]]
    with pytest.raises(BadInput, match="0 to 64 bits"):
        hamming_pairs([1], 65)


def planted_features(seed: int, n: int, d: int = 24) -> np.ndarray:
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, d)).astype(np.float32)
    q = n // 4
    noise = g.uniform(0, 0.3, (q, 1)) * g.normal(size=(q, d))
    x[:q] = x[g.integers(0, n, q)] * g.uniform(0.5, 2, (q, 1)) + noise
    return x


def test_cosine_pairs_are_exactly_those_of_the_whole_matrix():
    x = planted_features(0, 900)
    x[5], x[6], x[10], x[11] = 0, 0, x[12], x[12]   # rows of zeros, equal rows
    unit = x.astype(np.float64) / np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-300)
    cosine = np.triu(unit @ unit.T, k=1)
    assert cosine_pairs(x, 0.95).tolist() == np.argwhere(cosine >= 0.95).tolist()
    assert len(cosine_pairs(x, 0.95)) > 100


def test_within_cells_nearly_every_pair_is_found_and_none_is_invented(monkeypatch: pytest.MonkeyPatch):
    x = planted_features(1, 6000)
    exact = {tuple(pair) for pair in cosine_pairs(x, 0.95).tolist()}
    monkeypatch.setattr(joins, "BRUTE_FORCE_ROWS", 100)
    found = {tuple(pair) for pair in cosine_pairs(x, 0.95).tolist()}
    assert found <= exact and len(found) > 0.995 * len(exact) > 1000


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(BadInput, match="all finite"):
        cosine_pairs([[np.nan, 1.0]], 0.9)
    with pytest.raises(BadInput, match="above 0 and at most 1"):
        cosine_pairs([[1.0]], 95)
    assert cosine_pairs(np.zeros((4, 3)), 0.9).shape == cosine_pairs(np.empty((0, 3)), 0.9).shape == (0, 2)


# Near duplicates

def test_a_scaled_a_recompressed_and_a_slightly_cropped_picture_are_near_duplicates_of_it(tmp_path):
    images = [picture(seed, size=(256, 256)) for seed in range(6)]
    images[0].save(tmp_path / "again.jpg", quality=60)
    images += [images[0].resize((128, 128)), Image.open(tmp_path / "again.jpg"), images[0].crop((1, 1, 255, 255))]
    assert near(images) == [(0, 6), (0, 7), (0, 8), (6, 7), (6, 8), (7, 8)]


def test_the_same_shape_in_another_colour_is_no_duplicate():
    def icon(red: int, blue: int) -> Image.Image:
        """The two colours have one brightness, so that only colour tells the icons apart."""
        image = Image.new("RGB", (64, 64), (red, 0, blue))
        ImageDraw.Draw(image).polygon([(32, 6), (58, 56), (40, 40), (6, 50)], fill="white")
        ImageDraw.Draw(image).rectangle((5, 5, 18, 22), fill="white")
        return image

    first, other, same = icon(114, 0), icon(0, 255), icon(114, 2)
    assert (phash(first) ^ phash(other)).bit_count() <= 6 and (dhash(first) ^ dhash(other)).bit_count() <= 8
    assert near([first, other, same]) == [(0, 2)]


def test_a_mirrored_picture_is_far_in_hashes():
    image = picture(3, size=(256, 256))
    assert (phash(image) ^ phash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))).bit_count() > 20


def test_each_rule_alone_can_part_a_pair():
    word = 0x0F0F0F0F0F0F0F0F
    close, far_p, far_d = [word, word ^ 0b111111], [word, word ^ 0b1111111], [word, word ^ 0b111111111]
    grey = [[100, 100, 100], [100, 100, 112]]
    assert len(near_duplicates(close, close, grey, **LIMITS)) == 1
    assert len(near_duplicates(far_p, close, grey, **LIMITS)) == 0
    assert len(near_duplicates(close, far_d, grey, **LIMITS)) == 0
    assert len(near_duplicates(close, close, [[100, 100, 100], [100, 100, 112.1]], **LIMITS)) == 0


def test_a_brighter_copy_is_a_duplicate_where_a_gain_is_allowed_and_another_colour_never():
    word = 0x0F0F0F0F0F0F0F0F
    colours = [[100, 80, 60], [120, 96, 72], [60, 80, 100]]

    def joined(gain: float) -> list[list[int]]:
        return near_duplicates([word] * 3, [word] * 3, colours, **LIMITS, brightness_gain=gain).tolist()

    assert joined(1.0) == [] and joined(1.1) == [] and joined(1.15) == joined(1.25) == [[0, 1]]


# Groups

def test_a_chain_is_one_component_but_its_unlike_ends_are_not_grouped():
    chain = np.array([[0, 1], [1, 2], [2, 3], [5, 6]])
    assert components_of(8, chain).tolist() == [0, 0, 0, 0, 1, 2, 2, 3]
    groups = duplicate_groups(8, chain)
    assert [(group.members, group.medoid, group.component_size) for group in groups] == [
        ((1, 2), 1, 4), ((5, 6), 5, 2)]


def test_members_of_a_group_all_pair_with_each_other_and_no_item_is_in_two():
    g = np.random.default_rng(0)
    pairs = np.array([pair for pair in combinations(range(40), 2) if g.random() < 0.3])
    groups = duplicate_groups(40, pairs)
    linked = {tuple(pair) for pair in pairs.tolist()}
    assert all(pair in linked for group in groups for pair in combinations(group.members, 2))
    members = [item for group in groups for item in group.members]
    assert len(members) == len(set(members)) and all(group.medoid in group.members for group in groups)


def test_without_pairs_every_item_is_its_own_component():
    none = np.empty((0, 2), dtype=np.int64)
    assert components_of(3, none).tolist() == [0, 1, 2] and components_of(0, none).tolist() == []
    assert duplicate_groups(3, none) == []
