"""Flux as a backbone: packed latents and rotary positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.models.backbone import Backbone, bare_model, pack_latents, unpack_latents
from components.settings.models import TransformerSettings


class FluxBackbone(Backbone):
    """`UltraFluxTransformer2DModel`: packed latents, rotary positions, embedded guidance."""

    name = "flux"
    config_key = "guidance_embeds"
    folder_classes = ("UltraFluxTransformer2DModel", "FluxTransformer2DModel")

    def build_tiny(
        self,
        settings: TransformerSettings,
        widths: tuple[int, int],
        latent_channels: int,
        seed: int,
    ) -> Any:
        """Random Flux transformer of `transformer.tiny`."""
        from components.models.tiny import build_tiny_transformer

        tiny = settings.tiny
        return build_tiny_transformer(
            num_layers=tiny.num_layers,
            num_single_layers=tiny.num_single_layers,
            num_attention_heads=tiny.num_attention_heads,
            axes_dims_rope=tiny.axes_dims_rope,
            joint_attention_dim=widths[0],
            pooled_projection_dim=widths[1],
            in_channels=4 * latent_channels,
            guidance_embeds=True,
            rope_variant=settings.rope_variant,
            rope_window=settings.rope_window,
            seed=seed,
        )

    def load(self, folder: Path, settings: TransformerSettings) -> Any:
        """Flux transformer with the rope of the settings."""
        from components.models.transformer import UltraFluxTransformer2DModel

        return UltraFluxTransformer2DModel.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            rope_variant=settings.rope_variant,
            rope_window=settings.rope_window,
        )

    def predict(
        self,
        transformer: Any,
        noised: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor,
        *,
        guidance_scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Velocity; a token is a 2x2 block of latents."""
        height, width = noised.shape[-2:]
        grid = (height // 2, width // 2)
        takes_guidance = bool(bare_model(transformer).config.guidance_embeds)
        tokens = transformer(
            hidden_states=pack_latents(noised).to(dtype),
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            timestep=t,
            guidance=torch.full_like(t, guidance_scale) if takes_guidance else None,
            img_ids=None,
            txt_ids=None,
            grid_hw=grid,
            return_dict=False,
        )[0]
        return unpack_latents(tokens, *grid).float()

    def shape(self, transformer: Any) -> tuple[int, int, int]:
        """(C, D, P); four latent pixels share a token."""
        config = bare_model(transformer).config
        return config.in_channels // 4, config.joint_attention_dim, config.pooled_projection_dim
