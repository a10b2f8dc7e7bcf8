"""What training needs from a diffusion transformer, whatever its architecture.

The trainer, the validation and the loss know latents (B, C, h, w), noise levels and two text
tensors. How a transformer takes them (packed or not, with which scale of t, with a guidance input)
is the matter of its backbone here. Weights are exported with the transformer's own class, so what
a backbone trains is what diffusers loads.

Shape legend: B samples, C latent channels, h and w latent pixels (even), L text tokens, D and P
widths of the text states and of the pooled text vector.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from components.models.backbone import Backbone, bare_model
from components.models.flux_backbone import FluxBackbone
from components.models.sd3.backbone import Sd3Backbone

BACKBONES: dict[str, Backbone] = {b.name: b for b in (FluxBackbone(), Sd3Backbone())}


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
