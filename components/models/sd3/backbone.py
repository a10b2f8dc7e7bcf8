"""SD3 as a backbone: plain latents and a table of positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.models.backbone import TIMESTEPS, Backbone, bare_model
from components.settings.models import TransformerSettings


class Sd3Backbone(Backbone):
    """diffusers' SD3Transformer2DModel: plain latents, a table of positions, no guidance input."""

    name = "sd3"
    config_key = "pos_embed_max_size"
    folder_classes = ("SD3Transformer2DModel",)

    def build_tiny(
        self,
        settings: TransformerSettings,
        widths: tuple[int, int],
        latent_channels: int,
        seed: int,
    ) -> Any:
        """Random SD3 transformer of `transformer.sd3.tiny`."""
        from components.models.tiny import build_tiny_sd3_transformer

        tiny = settings.sd3.tiny
        return build_tiny_sd3_transformer(
            num_layers=tiny.num_layers,
            num_attention_heads=tiny.num_attention_heads,
            attention_head_dim=tiny.attention_head_dim,
            joint_attention_dim=widths[0],
            pooled_projection_dim=widths[1],
            latent_channels=latent_channels,
            sample_size=tiny.sample_size,
            pos_embed_max_size=tiny.pos_embed_max_size,
            seed=seed,
        )

    def load(self, folder: Path, settings: TransformerSettings) -> Any:
        """SD3 transformer with its table continued as the settings say."""
        from components.models.sd3.transformer import load_sd3_transformer

        return load_sd3_transformer(
            folder,
            dtype=torch.float32,
            pos_embed_max_size=settings.sd3.pos_embed_max_size,
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
        """Velocity; SD3 counts noise levels in thousandths."""
        del guidance_scale
        velocity: Tensor = transformer(
            hidden_states=noised.to(dtype),
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            timestep=t * TIMESTEPS,
            return_dict=False,
        )[0]
        return velocity.float()

    def shape(self, transformer: Any) -> tuple[int, int, int]:
        """(C, D, P)."""
        config = bare_model(transformer).config
        return config.in_channels, config.joint_attention_dim, config.pooled_projection_dim

    def check_size(self, transformer: Any, height: int, width: int) -> None:
        """Even edges within the table of positions."""
        from components.models.sd3.transformer import check_position_table

        super().check_size(transformer, height, width)
        check_position_table(bare_model(transformer), height, width)
