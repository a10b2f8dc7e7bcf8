"""PSNR, SSIM and NMSE against closed forms and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from components.images.arrays import ImageArray
from components.metrics.native import fidelity
from components.metrics.native.fidelity import ms_ssim, nmse, psnr_db, ssim


def noisy_pair(seed: int, height: int = 48, width: int = 70) -> tuple[ImageArray, ImageArray]:
    generator = np.random.default_rng(seed)
    smooth = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    first = np.clip(smooth + generator.normal(0, 20, (height, width, 3)), 0, 255)
    second = np.clip(first + generator.normal(0, 12, first.shape), 0, 255)
    return first.astype(np.uint8), second.astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_psnr_and_ssim_equal_scikit_image(seed: int) -> None:
    first, second = noisy_pair(seed)
    assert psnr_db(first, second) == pytest.approx(
        peak_signal_noise_ratio(first, second, data_range=255), rel=1e-12
    )
    reference = structural_similarity(
        first,
        second,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(first, second) == pytest.approx(reference, abs=1e-10)


def test_constant_offset_has_closed_form_psnr_and_nmse() -> None:
    first = np.full((16, 16, 3), 100, np.uint8)
    second = np.full((16, 16, 3), 110, np.uint8)
    assert psnr_db(first, second) == pytest.approx(20 * math.log10(25.5), abs=1e-12)
    assert nmse(first, second) == pytest.approx(0.01, abs=1e-15)


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    first, second = (np.full((16, 16, 3), level, np.uint8) for level in (100, 110))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)
    assert ssim(first, second) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_an_image_is_identical_to_itself(seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    assert psnr_db(image, image) == math.inf
    assert nmse(image, image) == 0.0
    assert ssim(image, image) == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_ssim_and_psnr_are_symmetric(seed: int) -> None:
    first, second = noisy_pair(seed, 20, 24)
    assert psnr_db(first, second) == psnr_db(second, first)
    assert ssim(first, second) == pytest.approx(ssim(second, first), abs=1e-12)


def test_nmse_of_a_black_reference_is_infinite_and_of_two_black_images_zero() -> None:
    black = np.zeros((12, 12, 3), np.uint8)
    assert nmse(black, black) == 0.0
    assert nmse(black, black + 1) == math.inf


def test_wrong_shapes_and_types_are_named() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="shapes differ"):
        psnr_db(image, np.zeros((16, 12, 3), np.uint8))
    with pytest.raises(ValueError, match="image must be uint8"):
        nmse(image, image.astype(np.float32))
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(image[:10], image[:10])


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_ssim_in_bands_equals_the_whole_image(rows: int) -> None:
    first, second = noisy_pair(11, 150, 203)
    x, y = first[..., 0], second[..., 0]
    whole = fidelity._similarity(x, y)
    bands = fidelity._similarity(x, y, band_px=rows * 203)
    assert bands == pytest.approx(whole, abs=1e-12)


def test_ms_ssim_equals_five_whole_scales_of_scikit_image() -> None:
    first, second = noisy_pair(12, 181, 230)
    exponents = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    channels = []
    for channel in range(3):
        x, y = first[..., channel].astype(float), second[..., channel].astype(float)
        product = 1.0
        for scale, exponent in enumerate(exponents):
            if scale:
                x, y = (
                    a[: a.shape[0] // 2 * 2, : a.shape[1] // 2 * 2]
                    .reshape(a.shape[0] // 2, 2, a.shape[1] // 2, 2)
                    .mean((1, 3))
                    for a in (x, y)
                )
            # Without the luminance term at all scales but the last: K1 so large that it is 1.
            value = structural_similarity(
                x,
                y,
                data_range=255,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                K1=0.01 if scale == 4 else 1e6,
            )
            product *= value**exponent
        channels.append(product)
    assert ms_ssim(first, second) == pytest.approx(np.mean(channels), abs=1e-9)


def test_ms_ssim_of_equal_images_is_one_and_small_ones_are_refused() -> None:
    first, second = noisy_pair(13, 180, 176)
    assert ms_ssim(first, first) == 1.0
    with pytest.raises(ValueError, match="at least 176 px"):
        ms_ssim(first[:100], second[:100])


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 13, 3), (1024, 1031, 3)])
def test_sums_of_squares_are_the_integers_of_numpy(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    black, white = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    one, two = (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
    wide = rng.integers(0, 256, (shape[0], 2 * shape[1], 3), dtype=np.uint8)
    for left, right in ((one, two), (black, white), (one, one), (wide[:, ::2], one)):
        difference = left.astype(np.int64) - right.astype(np.int64)
        error, energy = int((difference**2).sum()), int((left.astype(np.int64) ** 2).sum())
        mse = error / left.size
        assert psnr_db(left, right) == (math.inf if not error else 10 * math.log10(255**2 / mse))
        expected = error / energy if energy else (math.inf if error else 0.0)
        assert nmse(left, right) == expected
