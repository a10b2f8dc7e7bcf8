"""Settings of the networks (autoencoder, transformer, text encoders) and the buckets."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from components.settings.open_section import OpenSection
from components.settings.section import (
    CHANGES_NO_WEIGHT,
    CONTENT_COUNTS,
    Count,
    Ints,
    Section,
)

Quantisation = Literal["none", "int8", "nf4", "fp8"]


class BucketsSettings(Section):
    """Aspect-ratio buckets."""

    published: Literal["table", "text"]
    """Which published set: the supplement's table 3 or the sizes in its text."""
    target_pixels: Annotated[int, Field(ge=32 * 32)] | None
    """Keep the aspect ratios but scale to this area (embedded profile); None: published sizes."""


class TinyAutoencoder(Section):
    """Shape of the random autoencoder that stands in where no weights folder is named."""

    block_out_channels: Ints
    layers_per_block: Count
    norm_num_groups: Count


class AutoencoderSettings(Section):
    """The F16 autoencoder."""

    pretrained: Annotated[str | None, CONTENT_COUNTS]
    """Folder with a Flux VAE (F8, or F16 with stride 2); None: `tiny`."""
    stride: Literal[1, 2]
    decode_mode: Literal["aligned", "official_partitioned"]
    tiny: TinyAutoencoder


class TinyTransformer(Section):
    """Shape of the random Flux transformer."""

    num_layers: Count
    num_single_layers: Count
    num_attention_heads: Count
    axes_dims_rope: Annotated[tuple[Count, Count, Count], Strict(False)]


class ModelCardSettings(Section):
    """What only the owner of the weights can say in a model card."""

    license: Annotated[str, Field(pattern=r"^[a-z0-9.-]+$")]
    """Identifier of the model hub's list, such as apache-2.0, other or unknown. Weights trained
    from others inherit their terms."""
    license_name: str | None
    """Name of the licence where `license` is other."""
    base_model: str | None
    """Hub repository of the weights that training began with."""


class TransformerSettings(OpenSection):
    """The DiT; what one backbone alone needs stands in a section of its name."""

    chosen_by: ClassVar[str] = "backbone"
    table: ClassVar[str] = "components.models.backbones:BACKBONES"

    backbone: str
    """Architecture, a name of the registry of backbones; flux is UltraFlux'. The text encoders
    follow it."""
    pretrained: Annotated[str | None, CONTENT_COUNTS]
    """Folder of a transformer of that architecture; None: a random tiny one."""
    rope_variant: Literal["official", "official_prefix", "paper", "flux"]
    rope_window: Count
    """Training window in tokens per axis; paper: 64."""
    quantisation: Quantisation = "none"
    """Weights of its blocks in 8 or 4 bits, frozen: for training an adapter beside them, and for
    sampling. int8 and fp8 need torchao, nf4 bitsandbytes (extra `gpu`). What is exported is the
    unrounded base with the adapter merged."""
    card: Annotated[ModelCardSettings, CHANGES_NO_WEIGHT]
    tiny: TinyTransformer
    """Of the backbone flux."""


class TinyTextEncoders(Section):
    """Shapes of the random T5 and CLIP encoders."""

    t5_dim: Count
    clip_dim: Count
    """Width of the pooled vector. Where a backbone has two CLIPs, each has half of it (then even,
    at most t5_dim)."""
    vocab_size: Annotated[int, Field(ge=300)]


class TextEncodersSettings(Section):
    """T5 and CLIP."""

    pretrained: str | None
    """FLUX.1-dev folder (tokenizer, tokenizer_2, text_encoder, text_encoder_2), or for another
    backbone the folder with its parts; None: `tiny`."""
    max_sequence_length: Annotated[int, Field(ge=8, le=512)]
    quantisation: Quantisation = "none"
    """As `models.transformer.quantisation`, for the text store and for sampling."""
    tiny: TinyTextEncoders


class ModelsSettings(Section):
    """The three networks."""

    autoencoder: AutoencoderSettings
    transformer: TransformerSettings
    text_encoders: TextEncodersSettings
