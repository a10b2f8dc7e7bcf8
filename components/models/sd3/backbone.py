"""SD3 as a backbone: plain latents and a table of positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from components.models.backbone import Backbone, Shapes, TextFamily, bare_model
from components.models.sd3.settings import Sd3Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from components.settings.models import TransformerSettings

# Noise level 1 as the transformer is told it (the scheduler's num_train_timesteps).
TIMESTEPS = 1000.0


class Sd3Backbone(Backbone):
    """diffusers' SD3Transformer2DModel: plain latents, a table of positions, no guidance input."""

    name = "sd3"
    title = "SD3"
    settings = Sd3Settings
    config_key = "pos_embed_max_size"
    folder_classes = ("SD3Transformer2DModel",)
    repository = "stabilityai/stable-diffusion-3-medium-diffusers"
    weights_folder = "stable-diffusion-3-medium"
    published_name = "stable-diffusion-3-medium"
    # SD3-medium's values; plans use them where no folder is here, loading never does.
    published_config: ClassVar[Mapping[str, Any]] = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 192,
    }
    t5_part = "text_encoder_3"
    # The first CLIP is CLIP-L, this is bigG.
    further_clips = (
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
        },
    )
    # The context of both CLIPs, whose states stand side by side.
    clip_positions = 77

    def build_tiny(
        self,
        settings: TransformerSettings,
        widths: tuple[int, int],
        latent_channels: int,
        seed: int,
    ) -> Any:
        """Random SD3 transformer of `transformer.sd3.tiny`."""
        from components.models.sd3.transformer import build_tiny_sd3_transformer

        tiny = settings.own(self.name, Sd3Settings).tiny
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
        import torch

        from components.models.sd3.transformer import load_sd3_transformer

        return load_sd3_transformer(
            folder,
            dtype=torch.float32,
            pos_embed_max_size=settings.own(self.name, Sd3Settings).pos_embed_max_size,
        )

    def load_released(self, path: Path, *, dtype: torch.dtype, rope_variant: Any) -> Any:
        """SD3 transformer with its own table."""
        from components.models.sd3.transformer import load_sd3_transformer

        # Refused, not ignored: a sampled picture would claim a variant that it does not have.
        if rope_variant is not None:
            raise ValueError(f"rope_variant: {rope_variant}: SD3 has no rotary positions")
        return load_sd3_transformer(path, dtype=dtype)

    def text_family(self) -> TextFamily:
        """T5 and two CLIPs."""
        from components.models.sd3.text_encoders import SD3_TEXT

        return SD3_TEXT

    def pipeline_class(self) -> Any:
        """StableDiffusion3Pipeline on an F16 grid."""
        from components.models.sd3.pipeline import StableDiffusion3F16Pipeline

        return StableDiffusion3F16Pipeline

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
        # Trained without guidance input; sampling contrasts with the empty prompt instead.
        del guidance_scale
        velocity: Tensor = transformer(
            hidden_states=noised.to(dtype),
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            # Multiplied in float32: diffusers' SD3 expects 0 to 1000 and, unlike its Flux, scales
            # nothing.
            timestep=t * TIMESTEPS,
            return_dict=False,
        )[0]
        return velocity.float()

    def shape(self, transformer: Any) -> tuple[int, int, int]:
        """(C, D, P)."""
        config = bare_model(transformer).config
        return config.in_channels, config.joint_attention_dim, config.pooled_projection_dim

    def tensor_shapes(self, config: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
        """Latents that are not packed, and no guidance."""
        channels = int(config["in_channels"])
        given = int(config.get("out_channels") or channels)
        inputs: Shapes = {
            "hidden_states": (-1, channels, -1, -1),
            "encoder_hidden_states": (-1, -1, int(config["joint_attention_dim"])),
            "pooled_projections": (-1, int(config["pooled_projection_dim"])),
            "timestep": (-1,),
        }
        return inputs, {"sample": (-1, given, -1, -1)}

    def usage(self, config: Mapping[str, Any]) -> str:
        """Stock diffusers loads what was trained: the class is its own."""
        del config
        return "`diffusers.SD3Transformer2DModel.from_pretrained` loads this folder."

    def check_size(self, transformer: Any, height: int, width: int) -> None:
        """Even edges within the table of positions."""
        from components.models.sd3.transformer import check_position_table

        # Both: an even edge can lie beyond the table, and an odd one within it.
        super().check_size(transformer, height, width)
        check_position_table(bare_model(transformer), height, width)

    def from_config(self, config: Mapping[str, Any], latent_hw: tuple[int, int]) -> Any:
        """Diffusers' model, its table large enough for the latents."""
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        # Private entries (class and version) are no arguments of the constructor.
        known = {key: value for key, value in config.items() if not key.startswith("_")}
        patches = max(latent_hw) // int(known["patch_size"])
        # The table is cut to the image, so its size changes no operation.
        known["pos_embed_max_size"] = max(int(known["pos_embed_max_size"]), patches)
        return SD3Transformer2DModel.from_config(known)
