"""Buckets: no larger than asked, on the grid, and every picture in the one that cuts least."""

import pytest
from PIL import Image

from components.errors import BadInput
from components.families.family import Geometry
from components.latents.buckets import Bucket, assign, buckets, cropped_share, fit

SD15 = Geometry(resolution=512, side_step=64, min_side=256, downscale=8, channels=4)
SMALL = Geometry(resolution=64, side_step=16, min_side=64, downscale=8, channels=8)


@pytest.mark.parametrize("resolution", [512, 640, 768, 1024])
def test_no_bucket_exceeds_the_area_and_all_sides_are_on_the_grid(resolution: int):
    sizes = buckets(resolution, SD15)
    assert Bucket(resolution, resolution) in sizes
    for size in sizes:
        assert size.width * size.height <= resolution * resolution
        assert size.width % 64 == size.height % 64 == 0
        assert min(size.width, size.height) >= 256


@pytest.mark.parametrize("resolution", [32, 64])
def test_a_small_base_has_the_square_alone(resolution: int):
    assert buckets(resolution, SMALL) == (Bucket(resolution, resolution),)


def test_a_resolution_below_the_grid_is_refused():
    with pytest.raises(BadInput, match="steps of 16"):
        buckets(8, SMALL)


@pytest.mark.parametrize(("width", "height"), [(1000, 1000), (1600, 900), (900, 1600), (3000, 1000)])
def test_a_picture_goes_to_the_nearest_aspect(width: int, height: int):
    sizes = buckets(512, SD15)
    chosen = assign(width, height, sizes)
    share = cropped_share(width, height, chosen)
    assert all(cropped_share(width, height, other) >= share - 0.05 for other in sizes)


def test_fit_covers_the_bucket_and_cuts_the_centre():
    image = Image.new("RGB", (200, 100), "black")
    image.paste((255, 255, 255), (50, 0, 150, 100))
    fitted = fit(image, Bucket(64, 64))
    assert fitted.size == (64, 64)
    assert min(fitted.getpixel((2, 32)) + fitted.getpixel((61, 32))) > 250  # Lanczos rings by a level or two
    assert cropped_share(200, 100, Bucket(64, 64)) == pytest.approx(0.5)


def test_a_picture_of_the_buckets_size_keeps_its_pixels():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    assert fit(image, Bucket(64, 64)).tobytes() == image.tobytes()
