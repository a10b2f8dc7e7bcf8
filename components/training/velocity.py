"""One velocity prediction of the Flux transformer on latents, and the loss on it.

Shape legend: B samples, C latent channels, h and w latent pixels (even), L text tokens, D and P
widths of the T5 and CLIP embeddings. The transformer sees 2x2 latent pixels as one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from components.objectives.flow_matching import flow_matching_loss, interpolate, wavelet_flow_loss
from components.objectives.fused_snr_huber import fused_snr_huber_loss
from components.settings import ObjectiveSettings


@dataclass(frozen=True)
class NoisedBatch:
    """Everything one forward pass needs, on the CPU."""

    sample_ids: tuple[str, ...]
    latents: Tensor
    """(B, C, h, w) float32, normalised."""
    noise: Tensor
    """(B, C, h, w) float32."""
    t: Tensor
    """(B,) float32 in [0, 1]."""
    text: Tensor
    """(B, L, D) T5 embeddings."""
    pooled: Tensor
    """(B, P) CLIP embeddings."""

    def to(self, device: torch.device) -> NoisedBatch:
        """The same batch on `device`."""
        moved = (x.to(device) for x in (self.latents, self.noise, self.t, self.text, self.pooled))
        return NoisedBatch(self.sample_ids, *moved)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, for saving."""
        names = ("latents", "noise", "t", "text", "pooled")
        return {name: getattr(self, name).contiguous() for name in names}


def pack_latents(latents_BChw: Tensor) -> Tensor:
    """(B, C, h, w) to tokens (B, h/2 * w/2, 4 C), in FluxPipeline's order."""
    return rearrange(latents_BChw, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack_latents(tokens_BNC: Tensor, tokens_h: int, tokens_w: int) -> Tensor:
    """Inverse of `pack_latents`: (B, N, 4 C) to (B, C, 2 tokens_h, 2 tokens_w)."""
    return rearrange(
        tokens_BNC, "b (h w) (c p q) -> b c (h p) (w q)", h=tokens_h, w=tokens_w, p=2, q=2
    )


def predict_velocity(
    transformer: nn.Module, batch: NoisedBatch, guidance_scale: float, dtype: torch.dtype
) -> Tensor:
    """Predicted velocity of z_t = (1 - t) z + t eps.

    Args:
        transformer: an UltraFluxTransformer2DModel, or an engine around it.
        batch: on the transformer's device.
        guidance_scale: input of the guidance embedding; ignored by models that have none.
        dtype: of the transformer's inputs (its weights' dtype); t stays float32.

    Returns:
        (B, C, h, w) float32.

    Raises:
        ValueError: the latents' height or width is odd.
    """
    height, width = batch.latents.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"latents of {height}x{width}: the transformer needs even edges")
    grid = (height // 2, width // 2)
    noised = interpolate(batch.latents, batch.noise, batch.t)
    guidance = torch.full_like(batch.t, guidance_scale) if _takes_guidance(transformer) else None
    tokens = transformer(
        hidden_states=pack_latents(noised).to(dtype),
        encoder_hidden_states=batch.text.to(dtype),
        pooled_projections=batch.pooled.to(dtype),
        timestep=batch.t,
        guidance=guidance,
        img_ids=None,
        txt_ids=None,
        grid_hw=grid,
        return_dict=False,
    )[0]
    return unpack_latents(tokens, *grid).float()


def _takes_guidance(transformer: Any) -> bool:
    """Engines keep their own configuration in `config`, the model is below `module`."""
    model = getattr(transformer, "module", transformer)
    return bool(model.config.guidance_embeds)


def objective_loss(settings: ObjectiveSettings, velocity: Tensor, batch: NoisedBatch) -> Tensor:
    """The training objective per sample, (B,) float32."""
    if settings.kind == "snr_huber":
        return fused_snr_huber_loss(
            velocity, batch.latents, batch.noise, batch.t, settings.snr_huber
        )
    if settings.kind == "wavelet":
        return wavelet_flow_loss(
            velocity,
            batch.latents,
            batch.noise,
            batch.t,
            space=settings.wavelet_space,
            band_weights=settings.snr_huber.band_weights,
        )
    return flow_matching_loss(velocity, batch.latents, batch.noise)
