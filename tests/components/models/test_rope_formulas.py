"""Rotary spectra against a scalar transcription of the formulas, and what rotation must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given, settings
from hypothesis import strategies as st

from components.models.resonance_rope import ROPE_VARIANTS, ResonanceRope2D, axis_spectrum

variants = st.sampled_from(ROPE_VARIANTS)
extents = st.integers(1, 420)
THETA = 10000.0


def _nearest(x: float) -> float:
    return math.floor(x + 0.5)


def _ramp_down(index: int, low: float, high: float) -> float:
    """1 up to index `low`, 0 from `high` on."""
    return 1.0 - min(max((index - low) / (high - low), 0.0), 1.0)


def _band_with_cycles(cycles: float, dim: int, window: int) -> float:
    """The (fractional) band that turns `cycles` times in the window: w = theta^(-2k/dim)."""
    return dim / 2 * math.log(window / (2 * math.pi * cycles)) / math.log(THETA)


def _official(band: int, dim: int, window: int, tokens: int, *, prefix: bool) -> float:
    scale = tokens / window
    plain = THETA ** (-2 * band / dim)
    snapped_quantity = 1 / plain if prefix else plain
    cycles = window * snapped_quantity / (2 * math.pi)
    if cycles >= 1:
        snapped_quantity = 2 * math.pi * max(1.0, _nearest(cycles)) / window
    w = 1 / snapped_quantity if prefix else snapped_quantity
    linear = w / scale
    base = THETA * scale ** (dim / (dim - 2))
    ntk = base ** (math.log(w) / math.log(THETA))
    # Both blends run over band indices widened to whole numbers.
    low, high = (_band_with_cycles(c, dim, window) for c in (1.25, 0.75))
    share = _ramp_down(band, max(math.floor(low), 0), min(math.ceil(high), dim - 1))
    stretched = ntk * share + linear * (1 - share)
    low, high = (_band_with_cycles(c, dim, window) for c in (16.0, 2.0))
    share = _ramp_down(band, max(math.floor(low), 0), min(math.ceil(high), dim - 1))
    return w * share + stretched * (1 - share)


def _paper(band: int, dim: int, window: int, tokens: int) -> float:
    scale = min(max(tokens / window, 1.0), 2.0)
    cycles = max(1.0, _nearest(window * THETA ** (-2 * band / dim) / (2 * math.pi)))
    w = 2 * math.pi * cycles / window
    share = min(max((cycles - 0.75) / (1.25 - 0.75), 0.0), 1.0)
    return (1 - share) * w / scale + share * w


@pytest.mark.parametrize("dim", [16, 56, 64, 128])
@pytest.mark.parametrize("tokens", [65, 80, 96, 128, 170, 198, 372])
def test_stretched_spectra_equal_the_formulas_evaluated_band_by_band(dim: int, tokens: int) -> None:
    for window in (32, 64):
        expected = {
            "official": [_official(k, dim, window, tokens, prefix=False) for k in range(dim // 2)],
            "official_prefix": [
                _official(k, dim, window, tokens, prefix=True) for k in range(dim // 2)
            ],
            "paper": [_paper(k, dim, window, tokens) for k in range(dim // 2)],
            "flux": [THETA ** (-2 * k / dim) for k in range(dim // 2)],
        }
        for variant in ROPE_VARIANTS:
            actual, amplitude = axis_spectrum(tokens, dim, window=window, variant=variant)
            np.testing.assert_allclose(actual, expected[variant], rtol=1e-12, err_msg=variant)
            scale = {"flux": 1.0, "paper": min(tokens / window, 2.0)}.get(variant, tokens / window)
            assert amplitude == pytest.approx(0.1 * math.log(scale) + 1, rel=1e-14)


@settings(max_examples=200)
@given(
    variant=variants,
    tokens=extents,
    half_dim=st.integers(2, 64),
    window=st.integers(2, 128),
)
def test_frequencies_fall_with_the_band_and_no_band_outruns_half_again_its_plain_speed(
    variant: str, tokens: int, half_dim: int, window: int
) -> None:
    frequencies, amplitude = axis_spectrum(tokens, 2 * half_dim, window=window, variant=variant)
    plain, _ = axis_spectrum(tokens, 2 * half_dim, variant="flux")
    assert np.all(np.diff(frequencies) <= 1e-15)
    assert np.all(frequencies > 0)
    assert amplitude >= 1
    if variant != "paper":
        # Rounding a cycle count of 1 or more moves it by at most a third (1.5 to 2, or 1.5 to 1).
        assert np.all(frequencies <= 1.5 * plain + 1e-15)


@given(tokens=st.integers(65, 420), half_dim=st.integers(8, 64))
def test_bands_that_official_leaves_unscaled_make_whole_cycles_in_the_window(
    tokens: int, half_dim: int
) -> None:
    dim = 2 * half_dim
    frequencies, _ = axis_spectrum(tokens, dim, variant="official")
    plain, _ = axis_spectrum(tokens, dim, variant="flux")
    # Below the ramp's first index nothing is stretched.
    unscaled = np.arange(half_dim) <= max(math.floor(_band_with_cycles(16.0, dim, 64)), 0)
    cycles = 64 * frequencies[unscaled] / (2 * math.pi)
    # At 10 cycles no band of this base reaches 16, so only band 0 is certain to stay.
    assert unscaled[0]
    np.testing.assert_allclose(cycles, np.round(cycles), atol=1e-12)
    assert np.all(np.abs(cycles - 64 * plain[unscaled] / (2 * math.pi)) <= 0.5)


@given(tokens=extents, half_dim=st.integers(2, 64), window=st.integers(2, 128))
def test_paper_spectra_are_whole_cycles_of_the_window_or_stretched_single_cycles(
    tokens: int, half_dim: int, window: int
) -> None:
    frequencies, _ = axis_spectrum(tokens, 2 * half_dim, window=window, variant="paper")
    cycles = window * frequencies / (2 * math.pi)
    # The ramp (1.25, 0.75) halves the way for one cycle and leaves two and more alone.
    scale = min(max(tokens / window, 1.0), 2.0)
    single = 0.5 * (1 + 1 / scale)
    whole = np.round(cycles)
    np.testing.assert_allclose(cycles, np.where(cycles < 1.25, single, whole), atol=1e-9)


@given(variant=variants, tokens=st.integers(1, 64))
def test_flux_and_official_do_nothing_inside_the_window(variant: str, tokens: int) -> None:
    frequencies, amplitude = axis_spectrum(tokens, 56, variant=variant)
    plain, _ = axis_spectrum(tokens, 56, variant="flux")
    assert amplitude == 1.0
    if variant != "paper":
        np.testing.assert_array_equal(frequencies, plain)


def _rotated(rope: ResonanceRope2D, vector: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The vector at every position of the grid, rotated as Flux attention does it."""
    cos, sin = rope.tables(0, *grid)
    tokens = vector.expand(1, grid[0] * grid[1], 1, -1)
    return apply_rotary_emb(tokens, (cos, sin), sequence_dim=1)[0, :, 0].reshape(*grid, -1)


@settings(max_examples=40)
@given(
    variant=variants,
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 2**31),
)
def test_rotation_keeps_each_axis_norm_up_to_its_amplitude(
    variant: str, grid: tuple[int, int], seed: int
) -> None:
    rope = ResonanceRope2D((4, 6, 6), window=6, variant=variant)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    rotated = _rotated(rope, vector, grid)
    extents = (1, *grid)
    for axis, part in enumerate((slice(0, 4), slice(4, 10), slice(10, 16))):
        kind = variant if axis else "flux"
        dim = part.stop - part.start
        _, amplitude = axis_spectrum(extents[axis], dim, window=6, variant=kind)
        expected = amplitude * vector[part].norm().expand(grid)
        torch.testing.assert_close(rotated[..., part].norm(dim=-1), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(variant=variants, seed=st.integers(0, 2**31), data=st.data())
def test_scores_depend_on_the_offset_between_two_tokens_only(
    variant: str, seed: int, data: st.DataObject
) -> None:
    grid = (15, 11)
    rope = ResonanceRope2D((4, 6, 6), window=6, variant=variant)
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    queries, keys = _rotated(rope, query, grid), _rotated(rope, key, grid)
    offset = [data.draw(st.integers(0, extent - 1)) for extent in grid]
    starts = [data.draw(st.integers(0, e - 1 - o)) for e, o in zip(grid, offset, strict=True)]
    here = queries[0, 0] @ keys[offset[0], offset[1]]
    there = queries[starts[0], starts[1]] @ keys[starts[0] + offset[0], starts[1] + offset[1]]
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
