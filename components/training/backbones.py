"""What training needs from a diffusion transformer, whatever its architecture.

The trainer, the validation and the loss know latents (B, C, h, w), noise levels and two text
tensors. How a transformer takes them (packed or not, with which scale of t, with a guidance input)
is the matter of its backbone here. Weights are exported with the transformer's own class, so what
a backbone trains is what diffusers loads.

Shape legend: B samples, C latent channels, h and w latent pixels (even), L text tokens, D and P
widths of the text states and of the pooled text vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from components.settings import TransformerSettings

# Noise level 1 as SD3's transformer is told it (the scheduler's num_train_timesteps).
TIMESTEPS = 1000.0


class Backbone(ABC):
    """One architecture behind the trainer."""

    name: ClassVar[str]
    """Value of `models.transformer.backbone`."""
    config_key: ClassVar[str]
    """Entry that the configurations of its models have and those of the others have not."""
    folder_classes: ClassVar[tuple[str, ...]]
    """Classes named in the config.json of folders that it loads."""

    @abstractmethod
    def build_tiny(
        self,
        settings: TransformerSettings,
        widths: tuple[int, int],
        latent_channels: int,
        seed: int,
    ) -> Any:
        """Random small transformer in the true architecture, float32.

        Args:
            settings: its shape.
            widths: (D, P) of the text store.
            latent_channels: C of the latent store.
            seed: of the weights.
        """

    @abstractmethod
    def load(self, folder: Path, settings: TransformerSettings) -> Any:
        """Transformer of a local diffusers folder, float32.

        Raises:
            WeightsMissing: there is no model.
            ValueError: the folder holds another class.
        """

    @abstractmethod
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
        """Velocity of noised latents.

        Args:
            transformer: model, or an engine around it.
            noised: (B, C, h, w).
            t: (B,) float32 noise levels in [0, 1].
            text: (B, L, D) text states.
            pooled: (B, P) pooled text vectors.
            guidance_scale: input of the guidance embedding; ignored by models that have none.
            dtype: of the transformer's inputs (its weights' dtype); t stays float32.

        Returns:
            (B, C, h, w) float32.
        """

    @abstractmethod
    def shape(self, transformer: Any) -> tuple[int, int, int]:
        """(C, D, P) that the transformer is made for."""

    def check_size(self, transformer: Any, height: int, width: int) -> None:
        """Refuse latents of height x width that the transformer cannot place.

        Raises:
            ValueError: an edge is odd, or beyond the position table.
        """
        del transformer
        check_even(height, width)


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
        from components.models.sd3_transformer import load_sd3_transformer

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
        from components.models.sd3_transformer import check_position_table

        super().check_size(transformer, height, width)
        check_position_table(bare_model(transformer), height, width)


BACKBONES: dict[str, Backbone] = {b.name: b for b in (FluxBackbone(), Sd3Backbone())}


def pack_latents(latents_BChw: Tensor) -> Tensor:
    """(B, C, h, w) to tokens (B, h/2 * w/2, 4 C), in FluxPipeline's order."""
    return rearrange(latents_BChw, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack_latents(tokens_BNC: Tensor, tokens_h: int, tokens_w: int) -> Tensor:
    """Inverse of `pack_latents`: (B, N, 4 C) to (B, C, 2 tokens_h, 2 tokens_w)."""
    return rearrange(
        tokens_BNC, "b (h w) (c p q) -> b c (h p) (w q)", h=tokens_h, w=tokens_w, p=2, q=2
    )


def bare_model(transformer: Any) -> Any:
    """The model itself: engines keep it in `module`, and their own settings in `config`."""
    return getattr(transformer, "module", transformer)


def backbone_of(transformer: nn.Module) -> Backbone:
    """Backbone of a model, or of an engine around one.

    Raises:
        ValueError: its configuration is that of no backbone.
    """
    model = bare_model(transformer)
    for backbone in BACKBONES.values():
        if hasattr(model.config, backbone.config_key):
            return backbone
    raise ValueError(
        f"transformer: a {type(model).__name__} belongs to none of the backbones "
        f"{', '.join(BACKBONES)}"
    )


def check_even(height: int, width: int) -> None:
    """Latents are taken in 2x2 patches.

    Raises:
        ValueError: an edge is odd.
    """
    if height % 2 or width % 2:
        raise ValueError(f"latents of {height}x{width}: the transformer needs even edges")


def check_stores(
    transformer: nn.Module,
    widths: tuple[int, int],
    latent_channels: int,
    sizes: Iterable[tuple[int, int]],
) -> None:
    """Whether a transformer can be trained on a latent store and a text store.

    Args:
        transformer: bare model.
        widths: (D, P) of the text store.
        latent_channels: C of the latent store.
        sizes: (height, width) in latent pixels of all buckets.

    Raises:
        ValueError: it cannot; names what does not fit and what to change.
    """
    backbone = backbone_of(transformer)
    channels, *wanted = backbone.shape(transformer)
    if channels != latent_channels:
        raise ValueError(
            f"models.transformer: takes {channels} latent channels, the latent store has "
            f"{latent_channels}; use the autoencoder that belongs to it"
        )
    if tuple(wanted) != widths:
        raise ValueError(
            f"models.transformer ({backbone.name}): takes text states of width {wanted[0]} and "
            f"pooled vectors of width {wanted[1]}, the text store has {widths[0]} and "
            f"{widths[1]}; use the text encoders that belong to it and run `text_embeddings` again"
        )
    for height, width in sorted(set(sizes)):
        backbone.check_size(transformer, height, width)
