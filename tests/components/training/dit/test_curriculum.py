from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from components.training.dit.curriculum import (
    density_cdf,
    density_quantile,
    draw_noise,
    keyed_generator,
    restricted_time,
)

DENSITIES = ("uniform", "logit_normal", "shifted")


def closed_form_cdf(density: str):
    if density == "uniform":
        return lambda t: t
    if density == "logit_normal":
        return lambda t: stats.norm.cdf(special.logit(t))
    return lambda t: t / (3 - 2 * t)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("sigma_range", [(0.0, 1.0), (0.541, 1.0), (0.2, 0.3)])
def test_drawn_levels_follow_the_restricted_closed_form(density, sigma_range):
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(20_000, generator=generator, dtype=torch.float64)
    t = restricted_time(uniform, density, sigma_range).numpy()
    cdf, (low, high) = closed_form_cdf(density), sigma_range
    floor, ceiling = cdf(low), cdf(high)
    result = stats.kstest(t, lambda x: (cdf(x) - floor) / (ceiling - floor))
    assert result.pvalue > 0.01
    assert t.min() >= low
    assert t.max() <= high


@settings(deadline=None)
@given(st.sampled_from(DENSITIES), st.floats(1e-3, 1 - 1e-3))
def test_quantile_inverts_the_cdf(density, t):
    value = torch.tensor(t, dtype=torch.float64)
    # ndtr loses digits in its lower tail (Phi(logit 1e-3) is 2.5e-12), hence the tolerance.
    back = float(density_quantile(density_cdf(value, density), density))
    assert back == pytest.approx(t, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("density", DENSITIES)
def test_no_mass_piles_up_at_the_ends_of_the_range(density):
    uniform = torch.linspace(0, 1, 4097, dtype=torch.float64)[:-1]
    t = restricted_time(uniform, density, (0.541, 1.0))
    assert len(torch.unique(t)) == len(t)


def test_draws_do_not_depend_on_how_the_batch_is_split():
    ids, repeats = ["a", "b", "b", "c"], [0, 0, 1, 0]
    noise, t = draw_noise(7, 11, ids, repeats, (2, 4, 4), "logit_normal", (0.0, 1.0))
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part_noise, part_t = draw_noise(
            7, 11, ids[part], repeats[part], (2, 4, 4), "logit_normal", (0.0, 1.0)
        )
        assert torch.equal(part_noise, noise[part])
        assert torch.equal(part_t, t[part])


def test_seed_step_sample_and_repeat_each_change_the_draw():
    keys = [(1, 2, "a", 0), (2, 2, "a", 0), (1, 3, "a", 0), (1, 2, "b", 0), (1, 2, "a", 1)]
    draws = [float(torch.rand((), generator=keyed_generator(*key))) for key in keys]
    assert len(set(draws)) == len(keys)


def test_noise_is_standard_normal():
    noise, _ = draw_noise(
        0, 0, [str(i) for i in range(64)], [0] * 64, (16, 8, 8), "uniform", (0.0, 1.0)
    )
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("bad", [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_an_impossible_range_is_refused(bad):
    with pytest.raises(ValueError, match="sigma_range"):
        restricted_time(torch.zeros(1), "uniform", bad)


def test_an_unknown_density_is_refused():
    with pytest.raises(ValueError, match="timestep_density"):
        density_cdf(torch.zeros(1), "cosine")


def test_stage_two_starts_at_entry_459_of_the_unshifted_table():
    """Table 3's "0-459" as indices into diffusers' descending table of 1,000 levels.

    The unshifted table gives the 0.541 of the settings; with the sampler's shift of 3 the same
    entry is 0.780.
    """
    unshifted = FlowMatchEulerDiscreteScheduler(shift=1.0).sigmas
    assert len(unshifted) == 1000
    assert unshifted[0] == 1
    assert float(unshifted[459]) == pytest.approx(0.541, abs=1e-6)
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas
    assert float(shifted[459]) == pytest.approx(3 * 0.541 / (1 + 2 * 0.541), abs=1e-6)


def test_shifted_density_is_the_law_of_the_shifted_table():
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double().flip(0)
    share = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(density_cdf(table, "shifted"), share, atol=1e-6, rtol=0)
