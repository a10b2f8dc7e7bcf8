from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from components.models.f16_pipeline import build_scheduler
from components.settings.schema import parse_settings
from components.training.dit.curriculum import (
    NoiseLevels,
    density_cdf,
    density_quantile,
    draw_noise,
    dropped_captions,
    keyed_generator,
    trained_span,
)

ROOT = Path(__file__).resolve().parents[4]
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
    t = NoiseLevels(density, sigma_range).draw(uniform, 64).numpy()
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
    t = NoiseLevels(density, (0.541, 1.0)).draw(uniform, 64)
    assert len(torch.unique(t)) == len(t)


def test_draws_do_not_depend_on_how_the_batch_is_split():
    ids, repeats = ["a", "b", "b", "c"], [0, 0, 1, 0]
    noise, t = draw_noise(7, 11, ids, repeats, (2, 4, 4), NoiseLevels("logit_normal"))
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part_noise, part_t = draw_noise(
            7, 11, ids[part], repeats[part], (2, 4, 4), NoiseLevels("logit_normal")
        )
        assert torch.equal(part_noise, noise[part])
        assert torch.equal(part_t, t[part])


def test_seed_step_sample_and_repeat_each_change_the_draw():
    keys = [(1, 2, "a", 0), (2, 2, "a", 0), (1, 3, "a", 0), (1, 2, "b", 0), (1, 2, "a", 1)]
    draws = [float(torch.rand((), generator=keyed_generator(*key))) for key in keys]
    assert len(set(draws)) == len(keys)


def test_noise_is_standard_normal():
    noise, _ = draw_noise(
        0, 0, [str(i) for i in range(64)], [0] * 64, (16, 8, 8), NoiseLevels("uniform")
    )
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("bad", [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_an_impossible_range_is_refused(bad):
    with pytest.raises(ValueError, match="sigma_range"):
        NoiseLevels("uniform", bad).draw(torch.zeros(1), 64)


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


def test_captions_are_dropped_at_the_rate_and_by_the_key_of_their_sample():
    ids, zeros = [str(number) for number in range(4000)], [0] * 4000
    for rate in (0.0, 0.1, 0.464, 1.0):
        dropped = sum(dropped_captions(3, 7, ids, zeros, rate))
        assert stats.binomtest(dropped, 4000, rate).pvalue > 0.01
    few = dropped_captions(3, 7, ids, zeros, 0.1)
    parts = [dropped_captions(3, 7, ids[at : at + 7], zeros[at : at + 7], 0.1)
             for at in range(0, 4000, 7)]  # fmt: skip
    assert few == [one for part in parts for one in part]
    # A higher rate drops those of a lower one, and others.
    many = dropped_captions(3, 7, ids, zeros, 0.3)
    assert all(more for less, more in zip(few, many, strict=True) if less)
    others = [(4, 7, zeros), (3, 8, zeros), (3, 7, [1] * 4000)]
    for seed, step, occurrences in others:
        assert dropped_captions(seed, step, ids, occurrences, 0.1) != few


def sampler_levels(tokens: int, schedule: str) -> torch.Tensor:
    """The first half of 50 levels that the pipelines of this project sample at."""
    scheduler = build_scheduler(schedule=schedule)
    mu = calculate_shift(tokens, base_seq_len=256, max_seq_len=4096, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 50, 50), mu=mu)
    return scheduler.sigmas[:-1].double()


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16_384])
@pytest.mark.parametrize(("schedule", "shift"), [("static", 3.0), ("dynamic", "dynamic")])
def test_training_shifts_its_levels_as_sampling_does(tokens, schedule, shift):
    """Uniform levels at the sampler's grid become the sampler's levels, at every size."""
    levels = NoiseLevels("uniform", shift=shift).draw(torch.linspace(1.0, 1 / 50, 50), tokens)
    torch.testing.assert_close(levels, sampler_levels(tokens, schedule), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [3.0, "dynamic"])
@pytest.mark.parametrize("table", ["unshifted", "shifted"])
@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_shifted_levels_follow_the_restricted_law_of_shifted_draws(density, table, shift):
    """The law in closed form: of T = s t / (1 + (s - 1) t), t of the base density."""
    tokens = 1024
    s = 3.0 if shift == 3.0 else float(np.exp(0.5 + 0.65 * (tokens - 256) / (4096 - 256)))
    base = closed_form_cdf(density)

    def cdf(level):
        return base(level / (s - (s - 1) * level))

    low, high = (0.3, 0.9)
    if table == "shifted":
        low, high = (s * x / (1 + (s - 1) * x) for x in (low, high))
    levels = NoiseLevels(density, (0.3, 0.9), shift, table)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = levels.draw(uniform, tokens).numpy()
    assert t.min() == pytest.approx(low, abs=1e-3)
    assert t.max() == pytest.approx(high, abs=1e-3)
    result = stats.kstest(t, lambda x: (cdf(x) - cdf(low)) / (cdf(high) - cdf(low)))
    assert result.pvalue > 0.01


def test_zero_to_459_under_both_tables():
    """Table 3's "0-459": entries of the unshifted table, or of the one at shift 3."""
    kinds = {"unshifted": 1.0, "shifted": 3.0}
    for table, shift in kinds.items():
        sigmas = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
        for density, own in (("uniform", 3.0), ("shifted", 1.0)):
            low, high = NoiseLevels(density, (0.541, 1.0), own, table).range_at(64)
            assert low == pytest.approx(float(sigmas[459]), abs=1e-6)
            assert high == 1.0


def test_larger_images_of_a_batch_are_noised_more_and_the_card_names_the_whole_span():
    ids = [str(number) for number in range(200)]
    levels = NoiseLevels("logit_normal", shift="dynamic")
    small, large = (
        draw_noise(0, 0, ids, [0] * 200, (1, edge, edge), levels)[1] for edge in (32, 128)
    )
    assert bool((large > small).all())
    # The square root of the share of pixels is what equation 23 asks for two sizes; here Flux'
    # line: log-odds move by mu.
    moved = torch.logit(large.double()) - torch.logit(small.double())
    expected = 0.65 / 3840 * (64**2 - 16**2)
    torch.testing.assert_close(moved, torch.full_like(moved, expected), atol=2e-3, rtol=0)
    stage = parse_settings(yaml.safe_load((ROOT / "params.yaml").read_text())).dit_stage2
    stage = stage.model_copy(update={"sigma_table": "shifted", "timestep_shift": "dynamic"})
    index = pd.DataFrame({"latent_h": [32, 128], "latent_w": [32, 128]})
    low, high = trained_span(stage, index)
    assert low == pytest.approx(special.expit(special.logit(0.541) + 0.5))
    assert high == 1.0
