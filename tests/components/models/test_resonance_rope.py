"""Rotary tables against the released code's spectrum, diffusers' Flux, and closed forms."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from components.models.resonance_rope import ROPE_VARIANTS, ResonanceRope2D, axis_spectrum, grid_ids

REFERENCE = Path(__file__).parents[2] / "reference" / "rope_official.csv"


def _reference() -> dict[tuple[str, int], dict[int, tuple[float, float]]]:
    spectra: dict[tuple[str, int], dict[int, tuple[float, float]]] = defaultdict(dict)
    with REFERENCE.open() as file:
        for row in csv.DictReader(file):
            key = (row["variant"], int(row["tokens"]))
            spectra[key][int(row["band"])] = (float(row["frequency"]), float(row["mscale"]))
    return spectra


@pytest.mark.parametrize(("variant", "tokens"), sorted(_reference()))
def test_spectrum_equals_that_of_the_released_code(variant: str, tokens: int) -> None:
    bands = _reference()[variant, tokens]
    assert len(bands) == 28
    frequencies, amplitude = axis_spectrum(tokens, 56, variant=variant)
    assert frequencies.dtype == np.float64
    expected = np.array([bands[k][0] for k in range(28)])
    np.testing.assert_allclose(frequencies, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(amplitude, [bands[k][1] for k in range(28)], atol=1e-6, rtol=0)


def _flux_ids(text_len: int, tokens_h: int, tokens_w: int) -> torch.Tensor:
    ids = torch.zeros(tokens_h, tokens_w, 3)
    ids[..., 1] += torch.arange(tokens_h)[:, None]
    ids[..., 2] += torch.arange(tokens_w)[None, :]
    return torch.cat((torch.zeros(text_len, 3), ids.reshape(-1, 3)))


@pytest.mark.parametrize("grid", [(5, 9), (70, 12), (1, 1)])
def test_flux_variant_equals_diffusers_position_embedding(grid: tuple[int, int]) -> None:
    cos, sin = ResonanceRope2D(variant="flux").tables(7, *grid)
    expected_cos, expected_sin = FluxPosEmbed(10000, [16, 56, 56])(_flux_ids(7, *grid))
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


@pytest.mark.parametrize("variant", ["official", "official_prefix"])
def test_official_variants_equal_flux_inside_the_window(variant: str) -> None:
    inside = ResonanceRope2D(variant=variant).tables(3, 64, 40)
    flux = ResonanceRope2D(variant="flux").tables(3, 64, 40)
    assert torch.equal(inside[0], flux[0])
    assert torch.equal(inside[1], flux[1])


def test_only_the_stretched_axis_changes_and_text_carries_its_amplitude() -> None:
    cos, _ = ResonanceRope2D().tables(4, 64, 128)
    flux_cos, _ = ResonanceRope2D(variant="flux").tables(4, 64, 128)
    assert torch.equal(cos[:, :72], flux_cos[:, :72])
    assert not torch.allclose(cos[:, 72:], flux_cos[:, 72:], atol=1e-3)
    torch.testing.assert_close(cos[:4, 72:], torch.full((4, 56), 0.1 * math.log(2) + 1))


def test_every_snapped_band_closes_on_the_window() -> None:
    frequencies, _ = axis_spectrum(64, 56, variant="paper")
    cycles = 64 * frequencies / (2 * math.pi)
    np.testing.assert_allclose(cycles, np.round(cycles), atol=1e-12)
    assert len(set(np.round(cycles))) == 7


def test_paper_variant_caps_the_extrapolation_scale_at_two() -> None:
    at_cap, amplitude_at_cap = axis_spectrum(128, 56, variant="paper")
    beyond, amplitude_beyond = axis_spectrum(400, 56, variant="paper")
    np.testing.assert_array_equal(at_cap, beyond)
    assert amplitude_at_cap == amplitude_beyond == pytest.approx(0.1 * math.log(2) + 1)


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
@pytest.mark.parametrize("window", [2, 4, 8, 64])
def test_small_windows_still_stretch_the_slow_bands(variant: str, window: int) -> None:
    frequencies, amplitude = axis_spectrum(2 * window, 8, window=window, variant=variant)
    assert np.all(np.isfinite(frequencies))
    assert np.all(frequencies > 0)
    if variant.startswith("official"):
        assert frequencies[-1] == pytest.approx(1e4**-0.75 / 2, rel=0.2)
        assert amplitude > 1


def test_tables_are_cached_per_grid() -> None:
    rope = ResonanceRope2D((4, 6, 6), window=4)
    first = rope.tables(2, 5, 6)
    assert rope.tables(2, 5, 6)[0] is first[0]
    assert rope.tables(2, 6, 5)[0] is not first[0]
    assert first[0].dtype == torch.float32
    assert first[0].shape == (2 + 30, 16)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("tokens", {"tokens": 0, "dim": 56}),
        ("dim", {"tokens": 4, "dim": 7}),
        ("window", {"tokens": 4, "dim": 8, "window": 0}),
        ("variant", {"tokens": 4, "dim": 8, "variant": "yarn"}),
    ],
)
def test_bad_arguments_are_named(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        axis_spectrum(**arguments)  # type: ignore[arg-type]


def test_a_part_of_the_image_gets_the_rows_of_the_whole() -> None:
    rope = ResonanceRope2D((4, 6, 6), window=4)
    cos, sin = rope.tables(0, 6, 9)
    part_cos, part_sin = rope.at_positions(grid_ids(6, 9)[20:40], 6, 9)
    assert torch.equal(part_cos, cos[20:40])
    assert torch.equal(part_sin, sin[20:40])
