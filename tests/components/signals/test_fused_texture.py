from __future__ import annotations

import csv
import functools
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from components.images.decoding import decode_as_stored, decode_both
from components.images.scratch import Scratch
from components.signals.flat_regions import sobel_variance
from components.signals.fused_texture import MAX_PATCH_PX, fused_texture
from components.signals.glcm import glcm_measures
from components.signals.shrinking import box_reduced
from components.signals.texture_kernels import certain_distance

ROOT = Path(__file__).parents[3]
SAMPLE = sorted((ROOT / "data" / "sample").glob("*.jpg"))
PHOTOS = os.environ.get("ULTRAFLUX_PHOTOS")
SCRATCH = Scratch()


@functools.cache
def official() -> dict[str, dict[str, str]]:
    with (ROOT / "tests" / "reference" / "signals.csv").open() as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def official_measures(pixels: np.ndarray, patch_px: int = 240) -> tuple[float, float]:
    """The released tool, step by step: (entropy, flat share)."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    histogram = np.bincount(gray.ravel(), minlength=256)
    height, width = gray.shape
    flags = [
        sobel_variance(gray[top : top + patch_px, left : left + patch_px]) < 800
        for top in range(0, height - patch_px + 1, patch_px)
        for left in range(0, width - patch_px + 1, patch_px)
    ]
    flat = sum(flags) / len(flags) if flags else 0.0
    return float(scipy_entropy(histogram[histogram > 0], base=2)), flat


def assert_official(path: Path) -> None:
    _, pixels = decode_both(path.read_bytes(), scratch=SCRATCH)
    texture = fused_texture(pixels, scratch=SCRATCH)
    expected = official()[path.name]
    assert texture.gray.shape == (int(expected["height"]), int(expected["width"]))
    assert texture.entropy_bits == float(expected["shannon_entropy"])
    assert texture.flat_fraction == float(expected["flat_percentage"])


@pytest.mark.parametrize("path", SAMPLE, ids=lambda path: path.stem)
def test_entropy_and_flat_fraction_equal_the_official_tool_bit_for_bit(path: Path) -> None:
    assert_official(path)


@pytest.mark.slow
@pytest.mark.skipif(PHOTOS is None, reason="ULTRAFLUX_PHOTOS names no folder")
def test_every_reference_photograph_has_the_official_values() -> None:
    assert PHOTOS is not None
    names = sorted(path.name for path in Path(PHOTOS).iterdir() if path.name in official())
    assert names == sorted(official())
    for name in names:
        assert_official(Path(PHOTOS) / name)
        gray = fused_texture(decode_as_stored((Path(PHOTOS) / name).read_bytes()).pixels).gray
        measures = glcm_measures(gray)
        assert measures is not None
        expected = float(official()[name]["glcm_score"])
        assert measures[0] == pytest.approx(expected, rel=0, abs=1e-12), name


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 130),
    st.integers(1, 130),
    st.integers(3, 50),
    st.sampled_from([0, 3, 8, 20, 60]),
)
def test_any_image_and_patch_equals_the_slow_obvious_one(
    seed: int, height: int, width: int, patch_px: int, spread: int
) -> None:
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(128, spread, (height, width, 3)), 0, 255).astype(np.uint8)
    texture = fused_texture(pixels, patch_px=patch_px)
    assert (texture.entropy_bits, texture.flat_fraction) == official_measures(pixels, patch_px)
    np.testing.assert_array_equal(texture.gray, cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


def test_gray_is_that_of_opencv_for_every_level_of_every_channel() -> None:
    levels = np.arange(256, dtype=np.uint8)
    pixels = np.stack(np.meshgrid(levels, levels[::5], levels[::5], indexing="ij"), axis=-1)
    pixels = pixels.reshape(256, -1, 3)
    gray = fused_texture(pixels).gray
    np.testing.assert_array_equal(gray, cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


def test_a_patch_at_its_own_variance_is_decided_by_the_exact_formula() -> None:
    rng = np.random.default_rng(5)
    pixels = np.repeat(rng.integers(0, 60, (240, 240, 1), dtype=np.uint8), 3, axis=2)
    variance = sobel_variance(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))
    at = fused_texture(pixels, flat_variance=variance)
    assert (at.flat_fraction, at.uncertain_patches) == (0.0, 1)
    above = fused_texture(pixels, flat_variance=float(np.nextafter(variance, np.inf)))
    assert (above.flat_fraction, above.uncertain_patches) == (1.0, 1)


@pytest.mark.parametrize("patch_px", [240, MAX_PATCH_PX])
@pytest.mark.parametrize("kind", ["checks", "noise", "ramp"])
def test_the_fast_variance_is_within_its_bound(patch_px: int, kind: str) -> None:
    rows, columns = np.indices((patch_px, patch_px))
    gray = {
        # Largest possible gradients: the sum of squares must not overflow.
        "checks": ((rows // 2 + columns // 2) % 2 * 255).astype(np.uint8),
        "noise": np.random.default_rng(1).integers(0, 256, rows.shape, dtype=np.uint8),
        "ramp": (columns % 256).astype(np.uint8),
    }[kind]
    pixels = np.repeat(gray[..., None], 3, axis=2)
    variance = sobel_variance(gray)
    mean = np.sqrt(cv2.Sobel(gray, cv2.CV_64F, 1, 0) ** 2 + cv2.Sobel(gray, cv2.CV_64F, 0, 1) ** 2)
    distance = float(certain_distance(float(mean.mean()) * 1.1, patch_px))
    for threshold, is_flat in ((variance + 2 * distance, 1.0), (variance - 2 * distance, 0.0)):
        texture = fused_texture(pixels, patch_px=patch_px, flat_variance=threshold)
        assert (texture.flat_fraction, texture.uncertain_patches) == (is_flat, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(3, 50), st.integers(1, 300))
def test_the_small_copy_is_that_of_box_reduced_for_any_patch_and_factor(
    height: int, width: int, patch_px: int, factor: int
) -> None:
    rng = np.random.default_rng([height, width])
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    texture = fused_texture(pixels, patch_px=patch_px, reduced_by=factor)
    np.testing.assert_array_equal(texture.reduced, box_reduced(pixels, factor))
    assert texture.entropy_bits == fused_texture(pixels, patch_px=patch_px).entropy_bits


def test_half_a_million_equal_pixels_overflow_no_counter() -> None:
    """Two levels, each more often than twice 16 bits can count."""
    pixels = np.zeros((700, 1403, 3), np.uint8)
    pixels[:, 702:] = 255
    entropy = fused_texture(pixels).entropy_bits
    share = 702 / 1403
    assert entropy == pytest.approx(-share * np.log2(share) - (1 - share) * np.log2(1 - share))


def test_strided_pixels_are_measured_like_a_copy() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    mirrored = fused_texture(pixels[:, ::-1], patch_px=30)
    assert mirrored.entropy_bits == fused_texture(pixels, patch_px=30).entropy_bits


@pytest.mark.parametrize("patch_px", [2, 1025])
def test_a_patch_that_would_overflow_or_has_no_inside_is_refused(patch_px: int) -> None:
    with pytest.raises(ValueError, match=f"patch_px is {patch_px}: 3 to 1024"):
        fused_texture(np.zeros((9, 9, 3), np.uint8), patch_px=patch_px)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="no pixels"):
        fused_texture(np.zeros((0, 9, 3), np.uint8))
