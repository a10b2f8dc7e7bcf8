"""From settings to a loss: the one table of objectives."""

from __future__ import annotations

from torch import Tensor

from components.objectives.flow_matching import flow_matching_loss, wavelet_flow_loss
from components.objectives.fused_snr_huber import fused_snr_huber_loss
from components.settings.objective import ObjectiveSettings


def objective_loss(
    settings: ObjectiveSettings, velocity: Tensor, latents: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """The training objective per sample, (B,) float32."""
    if settings.kind == "snr_huber":
        return fused_snr_huber_loss(velocity, latents, noise, t, settings.snr_huber)
    if settings.kind == "wavelet":
        return wavelet_flow_loss(
            velocity,
            latents,
            noise,
            t,
            space=settings.wavelet_space,
            band_weights=settings.snr_huber.band_weights,
        )
    return flow_matching_loss(velocity, latents, noise)
