"""One velocity prediction of a transformer on latents, and the loss on it.

Shape legend: B samples, C latent channels, h and w latent pixels (even), L text tokens, D and P
widths of the text states and of the pooled text vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.models.backbone import check_even
from components.models.backbones import backbone_of
from components.objectives.flow_matching import interpolate
from components.objectives.haar import haar


@dataclass(frozen=True)
class NoisedBatch:
    """Everything one forward pass needs.

    As loaded it is on the CPU, latents and texts in the stored precision; `to` widens the latents,
    and a forward pass takes the texts in its own precision.
    """

    sample_ids: tuple[str, ...]
    latents: Tensor
    """(B, C, h, w) normalised; float32 for training."""
    noise: Tensor
    """(B, C, h, w) float32."""
    t: Tensor
    """(B,) float32 in [0, 1]."""
    text: Tensor
    """(B, L, D) text states."""
    pooled: Tensor
    """(B, P) pooled text vectors."""

    def to(self, device: torch.device) -> NoisedBatch:
        """The same batch on `device`, latents float32 (exact from bfloat16).

        Copies from page-locked memory do not wait.
        """
        parts = (self.latents, self.noise, self.t, self.text, self.pooled)
        # All copies are queued before anything waits for one.
        latents, *rest = (part.to(device, non_blocking=True) for part in parts)
        # Widened after the copy, so that stored bfloat16 travels as such. Texts stay as they are:
        # the model casts them.
        return NoisedBatch(self.sample_ids, latents.float(), *rest)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, for saving."""
        names = ("latents", "noise", "t", "text", "pooled")
        return {name: getattr(self, name).contiguous() for name in names}


def predict_velocity(
    transformer: nn.Module, batch: NoisedBatch, guidance_scale: float, dtype: torch.dtype
) -> Tensor:
    """Predicted velocity of z_t = (1 - t) z + t eps.

    Args:
        transformer: a transformer of any backbone, or an engine around it.
        batch: on the transformer's device.
        guidance_scale: input of the guidance embedding; ignored by models that have none.
        dtype: of the transformer's inputs (its weights' dtype); t stays float32.

    Returns:
        (B, C, h, w) float32.

    Raises:
        ValueError: the latents' height or width is odd, or the class has no backbone.
    """
    # A token is a 2x2 block of latents: said here, before a reshape fails deep in the model.
    check_even(*batch.latents.shape[-2:])
    # t stays float32: bfloat16 would round it to steps of 1/256 between 1/2 and 1.
    return backbone_of(transformer).predict(
        transformer,
        interpolate(batch.latents, batch.noise, batch.t),
        batch.t,
        batch.text,
        batch.pooled,
        guidance_scale=guidance_scale,
        dtype=dtype,
    )


def band_errors(velocity: Tensor, batch: NoisedBatch) -> list[Tensor]:
    """Velocity error by Haar band, four tensors (B,) in the order of `haar.BAND_NAMES`.

    Mean square of each band of v - (eps - z). The transform is orthonormal, so the mean of the four
    is the flow matching loss.
    """
    # The target: z_t = (1 - t) z + t eps moves with eps - z.
    error = velocity - (batch.noise - batch.latents)
    return [band.square().flatten(1).mean(1) for band in haar(error)]
