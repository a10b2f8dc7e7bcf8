"""What training asks of an architecture, and the packing of latents that the backbones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from components.settings.models import TransformerSettings

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


def check_even(height: int, width: int) -> None:
    """Latents are taken in 2x2 patches.

    Raises:
        ValueError: an edge is odd.
    """
    if height % 2 or width % 2:
        raise ValueError(f"latents of {height}x{width}: the transformer needs even edges")
