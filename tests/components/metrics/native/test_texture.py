"""Weight-free image metrics: closed forms and the corpus functions behind them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import convolve

from components.metrics.cards import CARDS
from components.metrics.native.texture import (
    colourfulness,
    laplacian_variance,
    set_compression_ratio,
    texture_metrics,
)
from components.signals.compression import jpeg95_ratio


def test_laplacian_variance_equals_a_plain_convolution() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (33, 47), dtype=np.uint8)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    reference = convolve(gray.astype(np.int64), kernel)[1:-1, 1:-1]
    assert laplacian_variance(gray, borders=False) == pytest.approx(
        float(np.var(reference)), rel=1e-12
    )


def test_laplacian_variance_of_a_linear_ramp_is_zero() -> None:
    gray = np.tile(np.arange(0, 64, dtype=np.uint8), (20, 1))
    assert laplacian_variance(gray, borders=False) == 0.0


def test_colourfulness_of_gray_is_zero_and_of_pure_red_is_known() -> None:
    gray = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert colourfulness(gray) == 0.0
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    assert colourfulness(red) == pytest.approx(0.3 * np.hypot(200, 100), rel=1e-12)


def test_set_compression_ratio_is_a_ratio_of_sums() -> None:
    generator = np.random.default_rng(1)
    images = [
        generator.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.full((128, 96, 3), 90, np.uint8),
    ]
    pairs = [(jpeg95_ratio([image]), image.shape[0] * image.shape[1]) for image in images]
    assert set_compression_ratio(pairs) == pytest.approx(jpeg95_ratio(images), rel=1e-12)


def test_metrics_are_null_where_no_patch_fits_and_all_have_a_card() -> None:
    image = np.random.default_rng(2).integers(0, 256, (63, 300, 3), dtype=np.uint8)
    values = texture_metrics(image)
    assert values["glcm_score"] is None
    assert values["flat_fraction"] is None
    assert values["entropy_bits"] is not None
    assert set(values) <= {card.id for card in CARDS}


def test_flat_fraction_of_a_uniform_image_with_a_full_patch_is_one() -> None:
    assert texture_metrics(np.full((240, 240, 3), 7, np.uint8))["flat_fraction"] == 1.0
