from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.images.aspect_buckets import Bucket, buckets, fit_to_bucket, nearest_bucket
from components.settings.models import BucketsSettings

TABLE = BucketsSettings(published="table", target_pixels=None)
TEXT = BucketsSettings(published="text", target_pixels=None)
SMALL = BucketsSettings(published="table", target_pixels=65536)


def test_table_set_is_ten_landscape_sizes_their_mirrors_and_the_square() -> None:
    sizes = buckets(TABLE)
    assert len(sizes) == 21
    assert {Bucket(3072, 5440), Bucket(5440, 3072), Bucket(4608, 3648), Bucket(4096, 4096)} <= set(
        sizes
    )
    assert all(Bucket(size.width, size.height) in sizes for size in sizes)


def test_text_set_holds_the_five_sizes_that_the_supplement_names() -> None:
    assert [size.name for size in buckets(TEXT)] == [
        "2880x5120",
        "3136x4704",
        "3840x3840",
        "4704x3136",
        "5120x2880",
    ]


@pytest.mark.parametrize("settings", [TABLE, TEXT, SMALL])
def test_every_edge_is_a_multiple_of_32_and_at_least_64(settings: BucketsSettings) -> None:
    for size in buckets(settings):
        assert size.height % 32 == 0
        assert size.width % 32 == 0
        assert min(size.height, size.width) >= 64


def test_small_set_keeps_area_and_holds_the_sizes_that_are_sampled() -> None:
    sizes = buckets(SMALL)
    for size in sizes:
        assert 0.8 < size.height * size.width / 65536 < 1.25
    assert {Bucket(256, 256), Bucket(192, 352), Bucket(352, 192), Bucket(160, 384)} <= set(sizes)


@given(st.integers(32 * 32, 4096 * 4096))
def test_any_target_area_gives_distinct_legal_sizes(target_pixels: int) -> None:
    sizes = buckets(BucketsSettings(published="table", target_pixels=target_pixels))
    assert len(set(sizes)) == len(sizes)
    assert all(min(s.height, s.width) >= 64 and s.height % 32 == s.width % 32 == 0 for s in sizes)


@pytest.mark.parametrize(
    ("height", "width", "name"),
    [(2880, 5120, "3072x5440"), (4000, 4000, "4096x4096"), (5120, 2880, "5440x3072")],
)
def test_nearest_bucket_of_known_ratios(height: int, width: int, name: str) -> None:
    assert nearest_bucket(height, width, buckets(TABLE)).name == name


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_nearest_bucket_is_the_nearest_in_log_ratio_and_mirrors(height: int, width: int) -> None:
    sizes = buckets(TABLE)
    chosen = nearest_bucket(height, width, sizes)
    distances = [abs(math.log(size.width / size.height / (width / height))) for size in sizes]
    assert abs(math.log(chosen.aspect_ratio / (width / height))) <= min(distances) + 1e-12
    mirrored = nearest_bucket(width, height, sizes)
    assert abs(math.log(mirrored.aspect_ratio) + math.log(chosen.aspect_ratio)) < 0.02


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(buckets(SMALL)))
def test_fit_gives_exactly_the_bucket(height: int, width: int, bucket: Bucket) -> None:
    fitted = fit_to_bucket(Image.new("RGB", (width, height), (9, 99, 199)), bucket)
    assert (fitted.height, fitted.width) == (bucket.height, bucket.width)
    assert fitted.getpixel((0, 0)) == (9, 99, 199)


def test_fit_of_a_matching_image_changes_no_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    fitted = fit_to_bucket(Image.fromarray(pixels), Bucket(256, 256))
    np.testing.assert_array_equal(np.asarray(fitted), pixels)


def test_fit_cuts_the_centre() -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    fitted = fit_to_bucket(Image.fromarray(pixels), Bucket(64, 64))
    assert np.asarray(fitted).min() == 255


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="0x5"):
        nearest_bucket(0, 5, buckets(TABLE))
    with pytest.raises(ValueError, match="no buckets"):
        nearest_bucket(5, 5, ())
    with pytest.raises(ValueError, match="mode L"):
        fit_to_bucket(Image.new("L", (8, 8)), Bucket(64, 64))
