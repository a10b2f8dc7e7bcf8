"""Flow matching path and losses: end points, consistency, Parseval."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.objectives.flow_matching import (
    flow_matching_loss,
    interpolate,
    predict_data,
    velocity_target,
    wavelet_flow_loss,
)


def _draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    velocity, latents, noise = torch.randn(3, 5, 4, 6, 8, generator=generator)
    return velocity, latents, noise, torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])


def test_path_starts_at_the_data_and_ends_at_the_noise() -> None:
    _, latents, noise, t = _draw()
    noised = interpolate(latents, noise, t)
    assert torch.equal(noised[0], latents[0])
    assert torch.equal(noised[-1], noise[-1])


def test_the_true_velocity_recovers_the_data_at_any_time() -> None:
    _, latents, noise, t = _draw()
    noised = interpolate(latents, noise, t)
    predicted = predict_data(noised, velocity_target(latents, noise), t)
    torch.testing.assert_close(predicted, latents, atol=1e-5, rtol=0)


def test_loss_is_zero_at_the_true_velocity_and_the_mean_square_elsewhere() -> None:
    velocity, latents, noise, _ = _draw()
    assert not flow_matching_loss(noise - latents, latents, noise).any()
    expected = (velocity - noise + latents).square().mean((1, 2, 3))
    torch.testing.assert_close(flow_matching_loss(velocity, latents, noise), expected)


def test_wavelet_loss_in_data_space_is_t_squared_times_flow_matching() -> None:
    velocity, latents, noise, t = _draw()
    expected = t.square() * flow_matching_loss(velocity, latents, noise)
    actual = wavelet_flow_loss(velocity, latents, noise, t, space="x0")
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_wavelet_loss_in_velocity_space_is_flow_matching() -> None:
    velocity, latents, noise, t = _draw()
    expected = flow_matching_loss(velocity, latents, noise)
    actual = wavelet_flow_loss(velocity, latents, noise, t, space="v")
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_band_weights_select_bands() -> None:
    velocity, latents, noise, t = _draw()
    unit = torch.eye(4).tolist()
    parts = [
        wavelet_flow_loss(velocity, latents, noise, t, space="v", band_weights=tuple(w))
        for w in unit
    ]
    torch.testing.assert_close(
        sum(parts), wavelet_flow_loss(velocity, latents, noise, t, space="v")
    )


def test_a_time_vector_of_the_wrong_length_is_refused() -> None:
    _, latents, noise, _ = _draw()
    with pytest.raises(ValueError, match=r"^t: "):
        interpolate(latents, noise, torch.zeros(2))
    with pytest.raises(ValueError, match="space"):
        wavelet_flow_loss(latents, latents, noise, torch.zeros(5), space="eps")  # type: ignore[arg-type]


@given(
    seed=st.integers(0, 2**31),
    t=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    half=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_parseval_makes_equal_band_weights_a_plain_square_at_any_size(
    seed: int, t: list[float], half: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, len(t), 2, 2 * half[0], 2 * half[1])
    velocity, latents, noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    times = torch.tensor(t, dtype=torch.float64)
    plain = flow_matching_loss(velocity, latents, noise)
    in_data = wavelet_flow_loss(velocity, latents, noise, times, space="x0")
    in_velocity = wavelet_flow_loss(velocity, latents, noise, times, space="v")
    torch.testing.assert_close(in_data, times.square() * plain, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(in_velocity, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("space", ["x0", "v"])
def test_wavelet_gradients_equal_finite_differences_and_are_finite_at_both_ends(space: str) -> None:
    generator = torch.Generator().manual_seed(2)
    velocity, latents, noise = torch.randn(3, 3, 2, 2, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    weights = (1.0, 0.5, 2.0, 4.0)
    assert torch.autograd.gradcheck(
        lambda v: wavelet_flow_loss(v, latents, noise, t, space=space, band_weights=weights),
        velocity.requires_grad_(True),
    )
