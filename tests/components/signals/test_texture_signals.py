from __future__ import annotations

import csv
import functools
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy as scipy_entropy
from skimage.feature import graycomatrix
from skimage.measure import shannon_entropy

from components.images.decoding import read_as_stored
from components.signals.compression import jpeg95_bytes, jpeg95_ratio
from components.signals.entropy import entropy_bits
from components.signals.flat_regions import flat_fraction, grayscale, sobel_variance
from components.signals.glcm import glcm_measures

ROOT = Path(__file__).parents[3]
SAMPLE = sorted((ROOT / "data" / "sample").glob("*.jpg"))
SMALL = ("galen-crout-175291.jpg", "ng-32703.jpg", "solus-tiles-light.jpg")


@functools.cache
def official() -> dict[str, dict[str, str]]:
    with (ROOT / "tests" / "reference" / "signals.csv").open() as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def slow_glcm(gray: np.ndarray) -> tuple[float, float]:
    """The released script, word for word in its steps, and the textbook entropy beside it."""
    edge = min(gray.shape)
    levels = gray[:edge, :edge] >> 2
    scores, entropies = [], []
    for top in range(0, edge - 63, 64):
        for left in range(0, edge - 63, 64):
            glcm = graycomatrix(
                levels[top : top + 64, left : left + 64],
                distances=[1, 2, 3, 4],
                angles=[0, np.pi / 4, np.pi / 2, 3 * np.pi / 4],
                levels=64,
                symmetric=False,
                normed=True,
            )
            scores.append(shannon_entropy(glcm))
            p = glcm.reshape(4096, 16)
            logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
            entropies.append(-(p * logs).sum(axis=0).mean())
    return float(np.mean(scores)), float(np.mean(entropies))


@pytest.mark.parametrize("path", SAMPLE, ids=lambda path: path.stem)
def test_entropy_and_flat_fraction_equal_the_official_tool_bit_for_bit(path: Path) -> None:
    gray = grayscale(read_as_stored(path).pixels)
    expected = official()[path.name]
    assert gray.shape == (int(expected["height"]), int(expected["width"]))
    assert entropy_bits(gray) == float(expected["shannon_entropy"])
    assert flat_fraction(gray) == float(expected["flat_percentage"])


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.name in SMALL else [pytest.mark.slow]) for path in SAMPLE],
    ids=lambda path: path.stem,
)
def test_glcm_score_equals_the_official_script(path: Path) -> None:
    measures = glcm_measures(grayscale(read_as_stored(path).pixels))
    assert measures is not None
    assert measures[0] == pytest.approx(float(official()[path.name]["glcm_score"]), abs=1e-12)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(64, 150), st.integers(64, 150), st.integers(1, 256))
def test_glcm_equals_the_slow_obvious_one(seed: int, height: int, width: int, spread: int) -> None:
    gray = np.random.default_rng(seed).integers(0, spread, (height, width), dtype=np.uint8)
    assert glcm_measures(gray) == pytest.approx(slow_glcm(gray), abs=1e-12)


def test_glcm_of_a_constant_image_has_one_level_pair_and_one_rare_value() -> None:
    measures = glcm_measures(np.full((64, 64), 77, np.uint8))
    assert measures is not None
    share = 16 / (64 * 64 * 16)
    assert measures[0] == pytest.approx(
        -(share * np.log2(share) + (1 - share) * np.log2(1 - share)), abs=1e-12
    )
    assert measures[1] == 0.0


def test_glcm_of_an_image_without_a_full_patch_is_not_measurable() -> None:
    assert glcm_measures(np.zeros((63, 500), np.uint8)) is None


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3).map(lambda s: (*s[:2], 3))))
def test_gray_is_the_fixed_point_formula(pixels: np.ndarray) -> None:
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    expected = (9798 * red + 19235 * green + 3735 * blue + 2**14) >> 15
    np.testing.assert_array_equal(grayscale(pixels), expected)


def test_entropy_of_known_histograms() -> None:
    assert entropy_bits(np.full((9, 9), 3, np.uint8)) == 0.0
    assert entropy_bits(np.arange(256, dtype=np.uint8).reshape(16, 16)) == 8.0
    assert entropy_bits(np.array([[0, 255]], np.uint8)) == 1.0
    with pytest.raises(ValueError, match="no pixels"):
        entropy_bits(np.zeros((0, 4), np.uint8))


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 600), st.integers(1, 8))))
def test_entropy_lies_between_0_and_8_and_ignores_positions(gray: np.ndarray) -> None:
    bits = entropy_bits(gray)
    assert 0.0 <= bits <= 8.0
    assert entropy_bits(np.sort(gray, axis=None).reshape(gray.shape)) == bits


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32 - 1), st.integers(1, 256), st.floats(0.1, 8))
def test_entropy_equals_scipy_bit_for_bit(seed: int, levels: int, skew: float) -> None:
    draws = np.random.default_rng(seed).random(5000) ** skew
    gray = (draws * levels).astype(np.uint8).reshape(50, 100)
    counts = np.bincount(gray.ravel(), minlength=256)
    assert entropy_bits(gray) == float(scipy_entropy(counts[counts > 0], base=2))


def slow_flat_fraction(gray: np.ndarray, patch_px: int, flat_variance: float) -> float:
    flat = total = 0
    for top in range(0, gray.shape[0] - patch_px + 1, patch_px):
        for left in range(0, gray.shape[1] - patch_px + 1, patch_px):
            patch = gray[top : top + patch_px, left : left + patch_px].copy()
            total += 1
            flat += sobel_variance(patch) < flat_variance
    return flat / total if total else 0.0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(8, 24))
def test_flat_fraction_equals_the_slow_obvious_one(seed: int, spread: int, patch_px: int) -> None:
    rng = np.random.default_rng(seed)
    gray = (rng.random((90, 110)) * np.linspace(1, spread, 110)).astype(np.uint8)
    assert flat_fraction(gray, patch_px=patch_px) == slow_flat_fraction(gray, patch_px, 800.0)


def test_a_variance_exactly_at_the_threshold_is_not_flat() -> None:
    patch = np.random.default_rng(5).integers(0, 30, (240, 240), dtype=np.uint8)
    variance = sobel_variance(patch)
    assert flat_fraction(patch, flat_variance=variance) == 0.0
    assert flat_fraction(patch, flat_variance=np.nextafter(variance, np.inf)) == 1.0


def test_gradients_see_nothing_outside_their_patch() -> None:
    gray = np.zeros((240, 480), np.uint8)
    gray[:, 240:] = 255
    assert flat_fraction(gray) == 1.0
    assert flat_fraction(gray[:, 1:]) == 0.0


def test_sobel_reflects_inside_the_patch() -> None:
    patch = np.random.default_rng(1).integers(0, 256, (20, 20), dtype=np.uint8)
    padded = cv2.copyMakeBorder(patch, 1, 1, 1, 1, cv2.BORDER_REFLECT_101).astype(np.float64)
    window = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    magnitude = np.hypot((window * kernel).sum((2, 3)), (window * kernel.T).sum((2, 3)))
    assert sobel_variance(patch) == pytest.approx(magnitude.var(), rel=1e-12)


def test_an_image_without_a_full_patch_has_flat_fraction_zero() -> None:
    assert flat_fraction(np.zeros((239, 5000), np.uint8)) == 0.0


def test_compression_ratio_is_a_ratio_of_sums() -> None:
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    plain = np.full((128, 128, 3), 90, np.uint8)
    expected = (noisy.nbytes + plain.nbytes) / (jpeg95_bytes(noisy) + jpeg95_bytes(plain))
    assert jpeg95_ratio([noisy, plain]) == expected
    assert jpeg95_ratio([plain]) > jpeg95_ratio([noisy])
    with pytest.raises(ValueError, match="empty set"):
        jpeg95_ratio([])


@pytest.mark.parametrize("shape", [(1, 65501), (65501, 1)])
def test_an_edge_that_no_jpeg_has_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]}: JPEG edges end at 65500"):
        jpeg95_bytes(np.zeros((*shape, 3), np.uint8))
    assert jpeg95_bytes(np.zeros((*(min(edge, 65500) for edge in shape), 3), np.uint8)) > 0
