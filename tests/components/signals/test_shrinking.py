from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.signals.shrinking import box_reduced


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([0, 1, 3]),
    st.one_of(st.integers(2, 16), st.integers(2, 80)),
)
def test_every_block_is_its_mean_rounded_half_up(
    seed: int, height: int, width: int, channels: int, factor: int
) -> None:
    shape = (height, width, channels) if channels else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    reduced = box_reduced(pixels, factor)
    assert reduced.shape == (-(-height // factor), -(-width // factor), *shape[2:])
    for row in range(reduced.shape[0]):
        for column in range(reduced.shape[1]):
            block = pixels[row * factor : (row + 1) * factor, column * factor :][:, :factor]
            area = block.shape[0] * block.shape[1]
            sums = block.astype(np.int64).sum(axis=(0, 1))
            np.testing.assert_array_equal(reduced[row, column], (2 * sums + area) // (2 * area))


@pytest.mark.parametrize("channels", [1, 3])
def test_even_halves_are_rounded_like_all_others(channels: int) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (600, 802, channels), dtype=np.uint8)
    pixels = pixels[..., 0] if channels == 1 else pixels
    blocks = pixels.astype(int).reshape(300, 2, 401, 2, -1).sum(axis=(1, 3))
    expected = ((blocks + 2) // 4).reshape(300, 401, *pixels.shape[2:])
    np.testing.assert_array_equal(box_reduced(pixels, 2), expected)


@pytest.mark.parametrize("factor", [180, 181, 200, 257, 258, 400])
def test_large_blocks_do_not_overflow(factor: int) -> None:
    pixels = np.full((400, 500), 255, np.uint8)
    assert (box_reduced(pixels, factor) == 255).all()


def test_a_factor_of_one_changes_nothing() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert box_reduced(pixels, 1) is pixels
