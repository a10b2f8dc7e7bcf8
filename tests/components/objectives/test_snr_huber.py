"""SNR-HW objective: limits, a naive float64 implementation, end points, low precision."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from components.objectives.flow_matching import flow_matching_loss
from components.objectives.haar import haar
from components.objectives.snr_huber import (
    SnrHuberSettings,
    huber_threshold,
    pseudo_huber,
    snr_huber_band_losses,
    snr_huber_wavelet_loss,
    time_weight,
)


def _draw(
    batch: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    velocity, latents, noise = torch.randn(3, batch, 4, 8, 6, generator=generator).to(dtype)
    return velocity, latents, noise


def _naive(
    velocity: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    settings: SnrHuberSettings,
) -> torch.Tensor:
    """The formulas as written, in float64, without any rearrangement."""
    velocity, latents, noise, t = (x.double() for x in (velocity, latents, noise, t))
    losses = []
    for v, z, eps, time in zip(velocity, latents, noise, t, strict=True):
        noised = (1 - time) * z + time * eps
        predicted = noised - time * v
        snr = (1 - time) ** 2 / time**2
        capped = torch.minimum(snr, torch.tensor(settings.gamma, dtype=torch.float64))
        c = (
            settings.c_min
            + (settings.c_max - settings.c_min) * (capped / settings.gamma) ** settings.alpha
        )
        omega = time / (1 - time) * capped**settings.beta
        if settings.time_weight == "fm_exact":
            omega = 2 / time**2
        total = torch.zeros((), dtype=torch.float64)
        for weight, mine, true in zip(settings.band_weights, haar(predicted), haar(z), strict=True):
            total += weight * (c**2 * (torch.sqrt(1 + ((mine - true) / c) ** 2) - 1)).sum()
        losses.append(omega * total / z.numel())
    return torch.stack(losses)


@pytest.mark.parametrize(
    "settings",
    [
        SnrHuberSettings(),
        SnrHuberSettings(alpha=0.5, beta=0.3, gamma=2.0),
        SnrHuberSettings(time_weight="fm_exact"),
        SnrHuberSettings(band_weights=(1.0, 2.0, 0.5, 4.0)),
    ],
)
def test_loss_equals_the_formulas_written_naively_in_float64(settings: SnrHuberSettings) -> None:
    velocity, latents, noise = _draw()
    t = torch.tensor([0.01, 0.2, 0.309, 0.5, 0.8, 0.99])
    actual = snr_huber_wavelet_loss(velocity, latents, noise, t, settings)
    expected = _naive(velocity, latents, noise, t, settings)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-7)


def test_large_thresholds_give_half_t_cubed_over_one_minus_t_times_flow_matching() -> None:
    velocity, latents, noise = _draw()
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    settings = SnrHuberSettings(c_min=1e4, c_max=1e4, beta=0.0)
    factor = 0.5 * t**3 / (1 - t)
    torch.testing.assert_close(
        snr_huber_wavelet_loss(velocity, latents, noise, t, settings),
        factor * flow_matching_loss(velocity, latents, noise),
        rtol=1e-4,
        atol=1e-8,
    )


def test_fm_exact_with_large_thresholds_is_the_flow_matching_loss() -> None:
    velocity, latents, noise = _draw()
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    settings = SnrHuberSettings(c_min=1e4, c_max=1e4, time_weight="fm_exact")
    torch.testing.assert_close(
        snr_huber_wavelet_loss(velocity, latents, noise, t, settings),
        flow_matching_loss(velocity, latents, noise),
        rtol=1e-4,
        atol=1e-8,
    )


def test_threshold_runs_from_c_max_at_the_data_to_c_min_at_the_noise() -> None:
    settings = SnrHuberSettings()
    threshold = huber_threshold(torch.linspace(0, 1, 101), settings)
    assert threshold[0] == pytest.approx(1.0)
    assert threshold[-1] == pytest.approx(0.2)
    assert torch.all(threshold.diff() <= 1e-6)


def test_time_weight_switches_where_snr_crosses_gamma() -> None:
    settings = SnrHuberSettings(gamma=4.0)
    t = torch.tensor([0.2, 1 / 3, 0.5, 0.9])  # SNR 16, 4, 1, 1/81
    expected = torch.tensor([0.25 * 4, 0.5 * 4, 1.0, 9 / 81])
    torch.testing.assert_close(time_weight(t, settings), expected)


def test_pseudo_huber_is_quadratic_for_small_and_linear_for_large_residuals() -> None:
    c = torch.tensor(0.5)
    assert pseudo_huber(torch.tensor(1e-5), c).item() == pytest.approx(0.5e-10, rel=1e-5)
    assert pseudo_huber(torch.tensor(1e5), c).item() == pytest.approx(0.5e5, rel=1e-4)


@pytest.mark.parametrize("kind", ["paper", "fm_exact"])
def test_gradients_are_finite_at_both_ends_of_time(kind: str) -> None:
    velocity, latents, noise = _draw(batch=2)
    velocity.requires_grad_(True)
    t = torch.tensor([0.0, 1.0])
    loss = snr_huber_wavelet_loss(velocity, latents, noise, t, SnrHuberSettings(time_weight=kind))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(velocity.grad).all()
    assert velocity.grad.abs().sum() > 0


def test_bfloat16_predictions_are_computed_in_float32() -> None:
    velocity, latents, noise = _draw(dtype=torch.bfloat16)
    t = torch.linspace(0.1, 0.9, 6)
    settings = SnrHuberSettings()
    low = snr_huber_wavelet_loss(velocity, latents, noise, t, settings)
    full = snr_huber_wavelet_loss(velocity.float(), latents.float(), noise.float(), t, settings)
    assert low.dtype == torch.float32
    assert torch.equal(low, full)


def test_band_losses_average_to_the_loss() -> None:
    velocity, latents, noise = _draw()
    t = torch.linspace(0.0, 1.0, 6)
    settings = SnrHuberSettings(band_weights=(1.0, 2.0, 3.0, 4.0))
    bands = snr_huber_band_losses(velocity, latents, noise, t, settings)
    assert bands.shape == (6, 4)
    torch.testing.assert_close(
        bands.mean(1), snr_huber_wavelet_loss(velocity, latents, noise, t, settings)
    )


def _every_level_of_a_schedule() -> torch.Tensor:
    """sigmas of the released sampling schedule, its whole training table, and both ends."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    table = scheduler.sigmas.clone()
    scheduler.set_timesteps(50)
    return torch.cat((table, scheduler.sigmas, torch.tensor([0.0, 1.0, 1e-12, 1 - 2**-24])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["paper", "fm_exact"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_loss_and_gradient_are_finite_at_every_level_of_the_schedule(
    dtype: torch.dtype, kind: str, beta: float
) -> None:
    t = _every_level_of_a_schedule()
    assert t.max() == 1
    assert t.min() == 0
    velocity, latents, noise = (
        torch.randn(3, len(t), 1, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype) * 8
    )
    # A perfect prediction is the other place where a square root could divide by zero.
    for prediction in (velocity, noise - latents):
        leaf = prediction.clone().requires_grad_(True)
        settings = SnrHuberSettings(time_weight=kind, beta=beta)
        loss = snr_huber_wavelet_loss(leaf, latents, noise, t.to(dtype), settings)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("kind", ["paper", "fm_exact"])
def test_gradients_equal_finite_differences_in_float64(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    velocity, latents, noise = torch.randn(3, 3, 2, 2, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    settings = SnrHuberSettings(time_weight=kind, band_weights=(1.0, 2.0, 0.5, 3.0))
    assert torch.autograd.gradcheck(
        lambda v: snr_huber_wavelet_loss(v, latents, noise, t, settings),
        velocity.requires_grad_(True),
    )


def test_half_precision_times_move_the_loss_by_their_rounding_only() -> None:
    """bfloat16 cannot tell t = 0.998 from 1; the clamp keeps its weight finite and ordered."""
    settings = SnrHuberSettings()
    t = torch.linspace(0.9, 1.0, 64).bfloat16()
    weights = time_weight(t, settings)
    assert torch.isfinite(weights).all()
    assert torch.equal(weights, time_weight(t.float(), settings))


@given(
    t=st.floats(1e-3, 1 - 1e-3),
    c=st.floats(1e3, 1e5),
    seed=st.integers(0, 2**31),
)
def test_the_quadratic_limit_holds_at_any_time_and_seed(t: float, c: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    velocity, latents, noise = torch.randn(3, 1, 2, 4, 4, generator=generator, dtype=torch.float64)
    time = torch.tensor([t], dtype=torch.float64)
    settings = SnrHuberSettings(c_min=c, c_max=c, beta=0.0)
    torch.testing.assert_close(
        snr_huber_wavelet_loss(velocity, latents, noise, time, settings),
        0.5 * time**3 / (1 - time) * flow_matching_loss(velocity, latents, noise),
        rtol=1e-4,
        atol=0,
    )


@given(residual=st.floats(-1e4, 1e4), c=st.floats(0.01, 10))
def test_pseudo_huber_lies_below_half_square_and_below_its_asymptote(
    residual: float, c: float
) -> None:
    r = torch.tensor(residual, dtype=torch.float64)
    value = float(pseudo_huber(r, torch.tensor(c, dtype=torch.float64)))
    assert 0 <= value <= residual**2 / 2
    assert value <= c * abs(residual)
    assert value >= c * abs(residual) - c**2 - 1e-9
