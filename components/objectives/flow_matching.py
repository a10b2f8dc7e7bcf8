"""Rectified-flow path and its losses. t runs from 0 (data) to 1 (noise).

z_t = (1 - t) z + t eps, velocity target v* = eps - z, data prediction z_hat = z_t - t v.
Dtype policy: path arithmetic keeps the latents' dtype, losses are computed in float32, or in
float64 where an input is float64 (for numerical differentiation).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from components.objectives.haar import haar

# Keeps |logit t| <= 9.2: exp(3 * 9.2) is far from float32's limit, so no weight overflows.
TIME_EPSILON = 1e-4


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32; leave float64 alone."""
    return x if x.dtype == torch.float64 else x.float()


def clamp_time(t: Tensor) -> Tensor:
    """Move t in [0, 1] off the singular end points: [1e-4, 1 - 1e-4], at least float32."""
    return at_least_float32(t).clamp(TIME_EPSILON, 1.0 - TIME_EPSILON)


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Reshape t (B,) to (B, 1, ..., 1) so that it broadcasts against `like` (B, ...).

    Raises:
        ValueError: t is not one value per sample.
    """
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(
            f"t: expected one time per sample, shape ({like.shape[0]},), got {tuple(t.shape)}"
        )
    # Checked, not broadcast: a t of shape (1,) would silently give the whole batch one noise level.
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Noised latents z_t = (1 - t) z + t eps.

    Args:
        latents: (B, C, H, W) clean latents z.
        noise: (B, C, H, W) standard normal eps.
        t: (B,) in [0, 1].

    Returns:
        (B, C, H, W) in the latents' dtype; exactly z at t = 0 and eps at t = 1.
    """
    # bfloat16 has 8 bits: mixing in it would round the noise level to a few hundred values.
    time = expand_time(t, latents).float()
    return ((1.0 - time) * latents.float() + time * noise.float()).to(latents.dtype)


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the straight path, v* = eps - z, at least float32."""
    return at_least_float32(noise) - at_least_float32(latents)


def predict_data(noised: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Data prediction z_hat = z_t - t v, in float32."""
    # z_t - t v = (1 - t) z + t eps - t (eps - z) = z for the true velocity, at every t.
    return noised.float() - expand_time(t, noised).float() * velocity.float()


def flow_matching_loss(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared velocity error per sample, ||v - (eps - z)||^2 / N.

    Args:
        velocity: (B, C, H, W) prediction, any floating dtype.
        latents: (B, C, H, W).
        noise: (B, C, H, W).

    Returns:
        (B,) float32.
    """
    # A small difference of numbers of order 1: in half precision it would drown in rounding.
    error = at_least_float32(velocity) - velocity_target(latents, noise)
    return error.square().flatten(1).mean(1)


def wavelet_flow_loss(
    velocity: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    space: Literal["x0", "v"] = "x0",
    band_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
) -> Tensor:
    """Squared error of Haar coefficients per sample (WLF, Diffusion-4K section 3.2).

    With equal band weights Parseval makes the transform irrelevant: `space="x0"` is exactly
    t^2 times, and `space="v"` exactly, the flow matching loss (both tested).

    Args:
        velocity: (B, C, H, W) prediction, H and W even.
        latents: (B, C, H, W).
        noise: (B, C, H, W).
        t: (B,) in [0, 1].
        space: compare predicted data (`x0`) or velocities (`v`).
        band_weights: weights of (ll, lh, hl, hh).

    Returns:
        (B,) float32, mean over all coefficients.
    """
    if space not in ("x0", "v"):
        raise ValueError(f"space: expected 'x0' or 'v', got {space!r}")
    # The four bands have equally many coefficients, so the mean of band means is the mean over all.
    error = at_least_float32(velocity) - velocity_target(latents, noise)
    if space == "x0":
        # z_hat - z = (z_t - t v) - z = -t (v - v*): no second pass over latents and noise.
        error = -at_least_float32(expand_time(t, error)) * error
    # A mean per band and not over all coefficients at once: the weights go in between.
    energies = [band.square().flatten(1).mean(1) for band in haar(error)]
    weights = torch.tensor(band_weights, dtype=error.dtype, device=error.device)
    return (torch.stack(energies, dim=1) * weights).mean(1)
