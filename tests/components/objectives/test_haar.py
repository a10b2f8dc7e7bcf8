"""Haar transform: known values, energy, round trip."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.objectives.haar import haar, inverse_haar


def test_bands_of_one_block_have_their_closed_forms() -> None:
    ll, lh, hl, hh = haar(torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]]))
    assert [band.item() for band in (ll, lh, hl, hh)] == [7.5, -4.5, -2.5, 1.5]


def test_vertical_change_is_in_lh_and_horizontal_change_in_hl() -> None:
    vertical = torch.tensor([0.0, 1.0]).repeat(4)[:, None].expand(8, 8)[None, None]
    _, lh, hl, hh = haar(vertical)
    assert lh.abs().min() == 1
    assert not hl.any()
    assert not hh.any()
    _, lh, hl, hh = haar(vertical.mT)
    assert hl.abs().min() == 1
    assert not lh.any()
    assert not hh.any()


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    half_height=st.integers(1, 9),
    half_width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_exact_and_energy_is_conserved(
    batch: int, channels: int, half_height: int, half_width: int, seed: int
) -> None:
    shape = (batch, channels, 2 * half_height, 2 * half_width)
    signal = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bands = haar(signal)
    torch.testing.assert_close(inverse_haar(bands), signal, atol=1e-12, rtol=0)
    energy = sum(band.square().sum() for band in bands)
    torch.testing.assert_close(energy, signal.square().sum())


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (0, 2)])
def test_odd_sizes_are_refused_with_the_size(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        haar(torch.zeros(1, 1, *size))


def test_bands_of_different_shapes_are_refused() -> None:
    band = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="bands"):
        inverse_haar((band, band, band, band[..., :1]))


def test_bands_equal_the_transform_written_as_one_orthogonal_matrix() -> None:
    height, width = 6, 10
    low, high = (
        torch.kron(torch.eye(n // 2, dtype=torch.float64), torch.tensor([[1.0, s]]) / 2**0.5)
        for n, s in ((height, 1.0), (height, -1.0))
    )
    low_w, high_w = (
        torch.kron(torch.eye(width // 2, dtype=torch.float64), torch.tensor([[1.0, s]]) / 2**0.5)
        for s in (1.0, -1.0)
    )
    # Rows of the Kronecker product act on the image read row by row.
    pairs = ((low, low_w), (high, low_w), (low, high_w), (high, high_w))
    matrix = torch.cat([torch.kron(rows, columns) for rows, columns in pairs])
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(60, dtype=torch.float64))
    image = torch.randn(height, width, generator=torch.Generator().manual_seed(0)).double()
    actual = torch.cat([band.flatten() for band in haar(image)])
    torch.testing.assert_close(actual, matrix @ image.flatten())


def test_bands_equal_pywavelets() -> None:
    pywt = pytest.importorskip("pywt")
    image = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    ll, (from_top, from_left, diagonal) = pywt.dwt2(image.numpy(), "haar")
    for mine, theirs in zip(haar(image), (ll, from_top, from_left, diagonal), strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(theirs))
