"""Lattices: known amplitudes, alone and on photographs, and what is no lattice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from components.images.arrays import ImageArray
from components.metrics.native.lattice import lattice_levels

SIZE = 512


def shown(plane: npt.NDArray[np.floating[Any]]) -> ImageArray:
    # Dithered, since a sine of one level would round to steps.
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, plane.shape)
    return np.repeat(np.clip(np.round(plane + noise), 0, 255).astype(np.uint8)[..., None], 3, 2)


def lattice(period: int, amplitude: float, height: int, width: int) -> npt.NDArray[np.float64]:
    """A sine across, of a phase that is no multiple of its period."""
    return (
        amplitude
        * np.sin(2 * np.pi * (np.arange(width) / period + 0.1))[None]
        * np.ones((height, 1))
    )


def photograph(root: Path) -> ImageArray:
    names = sorted((root / "data" / "sample").glob("*.jpg"))
    with Image.open(names[0]) as image:
        # A part of a size at which nothing was resampled.
        return np.asarray(image.convert("RGB").crop((100, 100, 868, 740)))


@pytest.mark.parametrize("period", [16, 32])
@pytest.mark.parametrize("amplitude", [1.0, 4.0])
def test_a_sine_has_its_root_mean_square_at_its_period_alone(period: int, amplitude: float) -> None:
    found = lattice_levels(shown(128 + lattice(period, amplitude, SIZE, SIZE + 7)))
    for other in (2, 16, 32):
        expected = amplitude / np.sqrt(2) if other == period else 0.0
        assert found[f"lattice_{other}px"] == pytest.approx(expected, abs=0.03)


def test_a_checkerboard_is_a_lattice_of_two_pixels() -> None:
    y, x = np.indices((SIZE, SIZE))
    found = lattice_levels(shown(128.0 + 3.0 * (-1.0) ** (y + x)))
    assert found["lattice_2px"] == pytest.approx(3.0, rel=0.02)
    assert found["lattice_16px"] == pytest.approx(0.0, abs=0.05)


def test_noise_gradients_and_edges_are_no_lattice() -> None:
    rng = np.random.default_rng(1)
    noise = shown(128 + rng.normal(0, 20, (SIZE, SIZE)))
    ramp = shown(np.linspace(0, 255, SIZE)[:, None] * np.ones(SIZE))
    halves = shown(np.where(np.arange(SIZE) < SIZE // 2 - 5, 40.0, 220.0) * np.ones((SIZE, 1)))
    for picture, most in ((noise, 0.5), (ramp, 0.05), (halves, 0.5)):
        for value in lattice_levels(picture).values():
            assert value is not None
            assert value < most


def test_on_a_photograph_an_added_lattice_is_found_with_its_strength(root: Path) -> None:
    plain = photograph(root)
    before = lattice_levels(plain)
    # At 32 px the photograph itself has power, which is taken off: less is found, never more.
    for period, tolerance in ((16, 0.15), (32, 0.3)):
        grid = lattice(period, 4.0, *plain.shape[:2])[..., None]
        added = np.clip(plain + grid, 0, 255).round().astype(np.uint8)
        after = lattice_levels(added)[f"lattice_{period}px"]
        base = before[f"lattice_{period}px"]
        assert base is not None
        assert base < 0.4
        assert after == pytest.approx(4.0 / np.sqrt(2), rel=tolerance)


def test_jpeg_blocks_and_blur_are_no_lattice_of_sixteen(root: Path) -> None:
    image = Image.fromarray(photograph(root))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=30)
    for picture in (Image.open(buffer), image.filter(ImageFilter.GaussianBlur(3))):
        value = lattice_levels(np.asarray(picture))["lattice_16px"]
        assert value is not None
        assert value < 0.5


def test_too_small_a_picture_has_no_value() -> None:
    assert set(lattice_levels(np.zeros((255, 900, 3), np.uint8)).values()) == {None}
