"""SNR-aware Huber wavelet objective (SNR-HW, UltraFlux section 3.2.3).

Residuals are Haar coefficients of the predicted minus the true data, R = -t W(v - v*). Each is
penalised by a pseudo-Huber function whose threshold c(t) falls with noise, and each sample is
weighted by omega(t). t runs from 0 (data) to 1 (noise); SNR(t) = (1 - t)^2 / t^2.

Everything is computed in float32 (float64 for float64 inputs) from l = logit(t): log SNR = -2 l is
exact and finite where (1 - t)^2 / t^2 overflows. t = 1 is the first index of the sampling
schedule, so the end points do occur; they are moved inwards by 1e-4 (`clamp_time`).

The paper publishes c_min and c_max only; alpha, beta and gamma are this project's choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from components.objectives.flow_matching import (
    at_least_float32,
    clamp_time,
    expand_time,
    velocity_target,
)
from components.objectives.haar import haar
from components.settings.objective import SnrHuberSettings

__all__ = [
    "SnrHuberSettings",
    "huber_threshold",
    "pseudo_huber",
    "snr_huber_band_losses",
    "snr_huber_wavelet_loss",
    "time_weight",
]


def _capped_log_snr(t: Tensor, gamma: float) -> Tensor:
    """Logarithm of min(SNR(t), gamma) for an already clamped t."""
    # log((1 - t)^2 / t^2) = -2 logit(t). Capped as a logarithm: the ratio itself reaches 1e8.
    return (-2.0 * torch.logit(t)).clamp(max=math.log(gamma))


def huber_threshold(t: Tensor, settings: SnrHuberSettings) -> Tensor:
    """c(t) = c_min + (c_max - c_min) (min(SNR, gamma) / gamma)^alpha.

    Args:
        t: (B,) in [0, 1].
        settings: objective settings.

    Returns:
        (B,) float32 in [c_min, c_max]; c_max near the data, c_min near pure noise.
    """
    # (min(SNR, gamma) / gamma)^alpha as exp(alpha log ratio), the ratio at most 1, so that c never
    # passes c_max.
    log_ratio = _capped_log_snr(clamp_time(t), settings.gamma) - math.log(settings.gamma)
    blend = torch.exp(settings.alpha * log_ratio)
    return settings.c_min + (settings.c_max - settings.c_min) * blend


def time_weight(t: Tensor, settings: SnrHuberSettings) -> Tensor:
    """Sample weight omega(t).

    `paper`: t / (1 - t) * min(SNR, gamma)^beta, computed as exp(l + beta min(-2 l, log gamma)).
    `fm_exact`: 2 / t^2, which makes c -> inf the flow matching loss itself. (`paper` with
    beta = 0 tends to 0.5 t^3 / (1 - t) times it instead.)

    Args:
        t: (B,) in [0, 1].
        settings: objective settings.

    Returns:
        (B,) float32, positive and finite.
    """
    clamped = clamp_time(t)
    if settings.time_weight == "fm_exact":
        # For c -> inf, rho is r^2 / 2 and r = t e: 2 / t^2 undoes both factors.
        return 2.0 / clamped.square()
    # t / (1 - t) is exp(logit t): product and power become a sum of logarithms, which neither
    # overflows nor gives 0 * inf at the end points.
    capped = _capped_log_snr(clamped, settings.gamma)
    return torch.exp(torch.logit(clamped) + settings.beta * capped)


def pseudo_huber(residual: Tensor, threshold: Tensor) -> Tensor:
    """rho_c(r) = c^2 (sqrt(1 + (r/c)^2) - 1), in the form that does not cancel for small r.

    Half a square for |r| << c and c |r| for |r| >> c.

    Args:
        residual: any shape.
        threshold: c > 0, broadcastable.

    Returns:
        Same shape as `residual`, non-negative.
    """
    # c^2 (sqrt(1 + x) - 1) subtracts two numbers close to 1: in float32 it is 0 for |r| < 3e-4 c.
    # Multiplied by (sqrt(1 + x) + 1) / (sqrt(1 + x) + 1) the subtraction is gone.
    return residual.square() / (1.0 + torch.sqrt(1.0 + (residual / threshold).square()))


def snr_huber_band_losses(
    velocity: Tensor, latents: Tensor, noise: Tensor, t: Tensor, settings: SnrHuberSettings
) -> Tensor:
    """Weighted loss of each Haar band per sample, for logging; its mean is the objective.

    Args:
        velocity: (B, C, H, W) predicted velocity, any floating dtype, H and W even.
        latents: (B, C, H, W) clean latents.
        noise: (B, C, H, W) the noise that was mixed in.
        t: (B,) in [0, 1].
        settings: objective settings.

    Returns:
        (B, 4) float32 in the order (ll, lh, hl, hh), including omega(t) and the band weights.

    Raises:
        ValueError: odd latent size, or t is not (B,).
    """
    clamped = clamp_time(t)
    error = at_least_float32(velocity) - velocity_target(latents, noise)
    # The Haar transform is linear: W(z_hat) - W(z) = -t W(v - v*), one transform instead of two.
    residual = -expand_time(clamped, error) * error
    threshold = expand_time(huber_threshold(clamped, settings), error)
    bands = [pseudo_huber(band, threshold).flatten(1).mean(1) for band in haar(residual)]
    weights = torch.tensor(settings.band_weights, dtype=error.dtype, device=error.device)
    return time_weight(clamped, settings)[:, None] * torch.stack(bands, dim=1) * weights


def snr_huber_wavelet_loss(
    velocity: Tensor, latents: Tensor, noise: Tensor, t: Tensor, settings: SnrHuberSettings
) -> Tensor:
    """SNR-HW objective per sample: omega(t) times the mean pseudo-Huber of Haar residuals.

    Args:
        velocity: (B, C, H, W) predicted velocity, any floating dtype, H and W even.
        latents: (B, C, H, W) clean latents.
        noise: (B, C, H, W) the noise that was mixed in.
        t: (B,) in [0, 1].
        settings: objective settings.

    Returns:
        (B,) float32, mean over coefficients.
    """
    return snr_huber_band_losses(velocity, latents, noise, t, settings).mean(1)
