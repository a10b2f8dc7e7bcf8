"""Settings that only SD3 has: the section `models.transformer.sd3`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from components.settings.section import Count, Section


class TinySd3Transformer(Section):
    """Shape of the random SD3 transformer."""

    num_layers: Count
    num_attention_heads: Count
    attention_head_dim: Count
    # Together with the table's side it sets the spacing of positions, not a size of images.
    sample_size: Annotated[int, Field(ge=2, multiple_of=2)]
    """Latent pixels over which the positions 0 to sample_size/2 are spread; SD3: 128."""
    pos_embed_max_size: Count
    """Side of the table of positions in 2x2 patches; SD3-2B: 192."""


class Sd3Settings(Section):
    """What the SD3 backbone has of its own."""

    pos_embed_max_size: Count | None
    """Continue the position table of `pretrained` to this many patches an edge (a patch is 32 px
    with F16), for images beyond it; null: its own, and larger images are an error."""
    tiny: TinySd3Transformer
