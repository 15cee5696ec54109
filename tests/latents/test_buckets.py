"""Buckets: no larger than asked, on the grid, and every picture in the one that cuts least, not enlarged unasked."""

import math
import random
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.config import TrainingConfig
from components.curation.manifest import SampleRow
from components.curation.pixels import decode
from components.errors import BadInput
from components.families.family import Geometry
from components.latents.buckets import Bucket, Placement, Rung, Sizing, buckets, contain, cover, fit, ladder
from components.latents.keys import mask_item, placements, sample_item, sizing_of
from components.stages import canonical_json

SD15 = Geometry(resolution=512, side_step=64, min_side=256, downscale=8, channels=4)
SMALL = Geometry(resolution=64, side_step=16, min_side=64, downscale=8, channels=8)


@pytest.mark.parametrize("resolution", [512, 640, 768, 1000, 1024])
def test_no_bucket_exceeds_the_area_and_all_sides_are_on_the_grid(resolution: int):
    sizes = buckets(resolution, SD15)
    assert Bucket(resolution // 64 * 64, resolution // 64 * 64) in sizes
    for rung in ladder(resolution, SD15):
        assert all(size.width * size.height <= resolution * resolution for size in rung.sizes)
        assert all(size.width % 64 == size.height % 64 == 0 for size in rung.sizes)
        assert all(min(size.width, size.height) >= 256 for size in rung.sizes)


@pytest.mark.parametrize("resolution", [32, 64])
def test_a_small_base_has_the_square_alone(resolution: int):
    assert buckets(resolution, SMALL) == (Bucket(resolution, resolution),)
    assert [rung.sizes for rung in ladder(resolution, SMALL)] == [buckets(resolution, SMALL)]


def test_a_resolution_below_the_grid_is_refused():
    with pytest.raises(BadInput, match="steps of 16"):
        buckets(8, SMALL)


def test_a_picture_goes_to_the_nearest_aspect_and_of_equals_to_the_larger():
    """The search by halves against a look at every bucket."""
    rng = random.Random(0)
    shapes = [(1000, 1000), (1600, 900), (900, 1600), (3000, 1000), (5, 4000), (4000, 5)]
    shapes += [(rng.randint(20, 4000), rng.randint(20, 4000)) for _ in range(500)]
    for sizes in (buckets(512, SD15), buckets(1000, SD15), buckets(64, SMALL), buckets(96, SMALL)):
        for width, height in shapes:
            aspect = math.log(width / height)
            found = Rung.of(sizes).nearest(width, height)
            best = min(sizes, key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.width * b.height))
            assert found == best


def sizing(*resolutions: int, geometry: Geometry = SD15, **settings: Any) -> Sizing:
    return sizing_of(geometry, TrainingConfig.model_validate({"resolution": resolutions} | settings))


@pytest.mark.parametrize("crop", ["centre", "smart", "pad"])
def test_no_picture_is_enlarged_unless_asked_or_smaller_than_every_bucket(crop: str):
    rng = random.Random(1)
    for _ in range(500):
        width, height = rng.randint(260, 3000), rng.randint(260, 3000)
        for placement in sizing(1024, 768, crop=crop).place(width, height):
            assert placement.width <= width and placement.height <= height
    (tiny,) = sizing(1024, crop=crop).place(200, 200)
    if crop == "pad":
        assert (tiny.width, tiny.height, tiny.bucket) == (200, 200, Bucket(256, 256))
    else:
        assert (tiny.width, tiny.height, tiny.bucket) == (256, 256, Bucket(256, 256))


def test_a_picture_takes_the_largest_of_the_smaller_buckets_that_it_fills_or_the_full_one_where_enlarging_is_asked():
    (small,) = sizing(1024).place(600, 600)
    assert small == Placement(Bucket(576, 576), 576, 576, 0, 0)
    (asked,) = sizing(1024, bucket_no_upscale=False).place(600, 600)
    assert asked == Placement(Bucket(1024, 1024), 1024, 1024, 0, 0)
    (large,) = sizing(1024).place(4000, 3000)
    assert large.bucket == Rung.of(buckets(1024, SD15)).nearest(4000, 3000)


def test_a_picture_is_trained_at_each_resolution_and_where_it_is_too_small_at_the_largest_that_it_fills():
    placed = sizing(512, 1024, 768).place(800, 800)
    assert [placement.bucket for placement in placed] == [Bucket(768, 768), Bucket(768, 768), Bucket(512, 512)]


def test_sizes_in_a_list_have_no_order_and_one_of_them_is_that_one():
    assert TrainingConfig.model_validate({"resolution": [512, 1024]}).resolution == (1024, 512)
    assert TrainingConfig.model_validate({"resolution": [512]}).resolution == 512
    for wrong in ([], [512, 512], [512, -1], 0):
        with pytest.raises(ValueError, match="resolution"):
            TrainingConfig.model_validate({"resolution": wrong})


def test_a_caches_settings_are_what_they_were_where_nothing_new_makes_a_difference():
    plain = sizing(64, geometry=SMALL)
    assert plain.settings() == {"resolution": 64}
    assert sizing(64, geometry=SMALL, bucket_no_upscale=False).settings() == {"resolution": 64}
    assert sizing(512, bucket_no_upscale=False).settings() == {"resolution": 512}
    others = [sizing(512), sizing(512, 768), *(sizing(512, crop=crop) for crop in ("smart", "pad"))]
    others += [sizing(512, crop="pad", bucket_no_upscale=False), sizing(64, geometry=SMALL, crop="pad")]
    assert len({canonical_json(one.settings()) for one in [plain, *others]}) == len(others) + 1


def test_fit_covers_the_bucket_and_cuts_the_centre():
    image = Image.new("RGB", (200, 100), "black")
    image.paste((255, 255, 255), (50, 0, 150, 100))
    fitted = fit(image, cover(200, 100, Bucket(64, 64)))
    assert fitted.size == (64, 64)
    assert min(fitted.getpixel((2, 32)) + fitted.getpixel((61, 32))) > 250  # Lanczos rings by a level or two


def test_padding_keeps_all_of_the_picture_and_surrounds_it_with_the_background():
    image = Image.effect_noise((200, 100), 80).convert("RGB")
    placement = contain(200, 100, Bucket(64, 64))
    assert (placement.content, placement.padded) == ((0, 16, 64, 48), True)
    fitted = np.asarray(fit(image, placement, (1, 2, 3)))
    assert (fitted[:16] == (1, 2, 3)).all() and (fitted[48:] == (1, 2, 3)).all()
    assert (fitted[16:48] == np.asarray(image.resize((64, 32), Image.Resampling.LANCZOS))).all()


@pytest.mark.parametrize("place", [cover, contain])
def test_a_picture_of_the_buckets_size_keeps_its_pixels(place: Any):
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    assert fit(image, place(64, 64, Bucket(64, 64))).tobytes() == image.tobytes()


def test_a_window_may_lie_anywhere_in_the_resized_picture():
    image = Image.effect_noise((200, 100), 80).convert("RGB")
    placement = cover(200, 100, Bucket(64, 64)).at((7, 0))
    resized = image.resize((128, 64), Image.Resampling.LANCZOS)
    assert fit(image, placement).tobytes() == resized.crop((7, 0, 71, 64)).tobytes()


# what a cache knows of it ----------------------------------------------------------------------------------------


def row(width: int, height: int, digest: str = "pixels", mask: str | None = "mask") -> SampleRow:
    return SampleRow("bytes", digest, "x.png", "", None, "0", "train", width, height, None, None, None, 1, mask)


def test_the_same_picture_in_another_bucket_or_window_is_another_item():
    """By resolution, by its own size, by the kind of crop and by the window; the usual crop has the key it had."""
    wide = row(1600, 900)
    placed = [
        *placements(wide, sizing(1024, 768, 512)),
        *placements(wide, sizing(1024, crop="pad")),
        *(placements(wide, sizing(1024))[0].at((left, 0)) for left in (0, 1)),
    ]
    for item in (sample_item, mask_item):
        keys = [found.key for placement in placed if (found := item(wide, placement))]
        assert len(set(keys)) == len(placed) == 6
    usual = placed[0]
    assert sample_item(wide, usual).key == f"pixels@{usual.bucket.width}x{usual.bucket.height}"


def test_a_picture_that_lies_on_its_side_goes_to_the_bucket_of_its_upright_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = BytesIO()
    Image.effect_noise((1600, 900), 80).save(data, "JPEG", exif=exif.tobytes())
    upright = decode(data.getvalue())
    assert upright.size == (900, 1600)
    (placement,) = sizing(512).place(*upright.size)
    assert placement.bucket.height > placement.bucket.width
    assert fit(upright, placement).size == (placement.bucket.width, placement.bucket.height)
