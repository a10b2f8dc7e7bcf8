"""The registry of architectures, and which of them a model, a folder or a text encoder belongs to.

A new backbone is a folder beside `sd3` with a subclass of `Backbone`, and its line in `BACKBONES`.
No torch on import (see `components.models.backbone`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.weight_folders import class_name
from components.models.backbone import Backbone, TextFamily, bare_model
from components.models.flux_backbone import FluxBackbone
from components.models.sd3.backbone import Sd3Backbone

if TYPE_CHECKING:
    from torch import nn

# The first stands in where a folder does not say what it is: weights in one file are Flux'.
BACKBONES: dict[str, Backbone] = {b.name: b for b in (FluxBackbone(), Sd3Backbone())}


def backbone_of(transformer: nn.Module) -> Backbone:
    """Backbone of a model, or of an engine around one.

    Raises:
        ValueError: its configuration is that of no backbone.
    """
    # By configuration, not by class: a model inside an engine, an adapter or a compiled wrapper is
    # still asked for its own entries.
    model = bare_model(transformer)
    for backbone in BACKBONES.values():
        if hasattr(model.config, backbone.config_key):
            return backbone
    raise ValueError(
        f"transformer: a {type(model).__name__} belongs to none of the backbones "
        f"{', '.join(BACKBONES)}"
    )


def backbone_of_config(config: Mapping[str, Any]) -> Backbone:
    """Backbone of a model whose configuration this is.

    Raises:
        ValueError: it is that of no backbone.
    """
    # A key that the others lack, not `_class_name`: stock and own classes share it.
    for backbone in BACKBONES.values():
        if backbone.config_key in config:
            return backbone
    raise ValueError(f"a configuration of none of the backbones {', '.join(BACKBONES)}")


def backbone_of_class(name: str | None) -> Backbone | None:
    """Backbone whose folders name the class `name`; None: there is none."""
    return next((b for b in BACKBONES.values() if name in b.folder_classes), None)


def backbone_in(path: Path) -> Backbone:
    """Backbone whose transformer a folder or file holds; the first one where it does not say."""
    # class_name is None for a single file.
    return backbone_of_class(class_name(path)) or next(iter(BACKBONES.values()))


def _families() -> list[TextFamily]:
    """Families, those with a part of their own first: the others' parts may be among theirs."""
    families = [backbone.text_family() for backbone in BACKBONES.values()]
    return sorted(families, key=lambda family: family.own_part is None)


def family_of(parts: Any) -> TextFamily:
    """Family of loaded encoders, or of a pipeline."""
    return next(f for f in _families() if f.own_part is None or hasattr(parts, f.own_part))


def family_in(folder: Path) -> TextFamily:
    """Family whose encoders a folder holds."""
    return next(f for f in _families() if f.own_part is None or (folder / f.own_part).is_dir())


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
    # Before the first step: a bucket that does not fit would else stop a run hours later.
    for height, width in sorted(set(sizes)):
        backbone.check_size(transformer, height, width)
