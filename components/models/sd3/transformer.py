"""SD3's transformer (Diffusion-4K's second backbone): loading, and its table of positions.

The class is diffusers' own, unchanged: what is trained here loads anywhere. It adds a fixed
sine-cosine vector to each 2x2 patch of latents, cut from the centre of a square table of
`pos_embed_max_size` patches. SD3-2B's table has 192: with F16 latents a 4096x4096 image (128x128
patches) lies inside it, and no edge may be longer than 6144 px. The widest published buckets
(6272x2688 and 6336x2624, 196 and 198 patches) need a larger table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import nn

from components.files.weight_folders import require_class
from components.models.checkpoint_files import check_folder

SD3_CLASS = "SD3Transformer2DModel"
# Tables are stored in half precision in published checkpoints; bfloat16 is within 2^-9.
TABLE_TOLERANCE = 5e-3


def load_sd3_transformer(
    folder: str | Path, *, dtype: torch.dtype, pos_embed_max_size: int | None = None
) -> SD3Transformer2DModel:
    """A transformer from a local folder, sharded or not.

    Args:
        folder: diffusers folder.
        dtype: of the weights.
        pos_embed_max_size: see `extend_position_table`; None: the folder's own table.

    Returns:
        Model in evaluation mode.

    Raises:
        WeightsMissing: a file is not there.
        WeightsBroken: unreadable files, or tensors missing, unknown or misshapen.
        ValueError: the folder holds another class, or its table cannot be continued.
    """
    require_class(folder, None, (SD3_CLASS,))
    check_folder(Path(folder), SD3Transformer2DModel, "transformer")
    model = SD3Transformer2DModel.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
    ).eval()
    # diffusers records the folder in the configuration; saved bytes must not depend on it.
    model.register_to_config(_name_or_path="")
    if pos_embed_max_size is not None:
        extend_position_table(model, pos_embed_max_size)
    return model


def build_tiny_sd3_transformer(
    *,
    num_layers: int = 2,
    num_attention_heads: int = 4,
    attention_head_dim: int = 32,
    joint_attention_dim: int = 64,
    pooled_projection_dim: int = 64,
    latent_channels: int = 16,
    sample_size: int = 16,
    pos_embed_max_size: int = 24,
    seed: int = 0,
) -> SD3Transformer2DModel:
    """Random SD3 transformer whose first prediction is zero velocity.

    Args:
        num_layers: joint blocks.
        num_attention_heads: heads.
        attention_head_dim: channels of each.
        joint_attention_dim: width of the joint text states.
        pooled_projection_dim: width of the pooled text vector.
        latent_channels: the autoencoder's.
        sample_size: latent pixels over which the positions 0 to sample_size/2 are spread; SD3: 128.
        pos_embed_max_size: side of the table of positions in 2x2 patches; SD3: 192.
        seed: of the weights; the global random state is untouched.

    Returns:
        Model in evaluation mode, float32.

    Raises:
        ValueError: the channels do not divide into sines and cosines of two axes.
    """
    width = num_attention_heads * attention_head_dim
    if width % 4:
        raise ValueError(
            f"attention_head_dim: {attention_head_dim} times {num_attention_heads} heads must be a "
            "multiple of 4"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SD3Transformer2DModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            # SD3 projects the text straight to the width of its blocks.
            caption_projection_dim=width,
            pooled_projection_dim=pooled_projection_dim,
            pos_embed_max_size=pos_embed_max_size,
        )
    # adaLN-zero's output half: training starts from the mean prediction instead of noise.
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    model.eval()
    return model


@torch.no_grad()
def extend_position_table(model: Any, size: int) -> None:
    """Continue the table on all sides to `size` patches, at its own spacing.

    The centre keeps its stored values, so images that fitted before get the same vectors. The
    larger table is part of the weights and of the configuration: stock diffusers loads it.

    Args:
        model: changed in place.
        size: new side in patches; not larger than the table: nothing happens.

    Raises:
        ValueError: the sides differ by an odd number (the centre would move by half a patch), or
            the stored table is not the sine-cosine table of its configuration (one that was
            continued before is not: continue the original instead).
    """
    embed = model.pos_embed
    old, width = int(embed.pos_embed_max_size), int(embed.pos_embed.shape[-1])
    if size <= old:
        return
    margin, odd = divmod(size - old, 2)
    if odd:
        raise ValueError(
            f"pos_embed_max_size: {size} and the table's {old} must differ by an even number, "
            f"such as {size + 1}"
        )
    # diffusers spreads base_size positions over the side of the table; a longer side at the old
    # spacing goes beyond both ends instead of squeezing in.
    spacing = embed.base_size / old / embed.interpolation_scale
    # Negative before the stored table's first patch, so that the centre's numbers stay.
    positions = (torch.arange(size, dtype=torch.float32) - margin) * spacing
    # diffusers' order: the first half of the channels is the column's.
    grid = torch.stack(torch.meshgrid(positions, positions, indexing="xy"))
    flat = get_2d_sincos_pos_embed_from_grid(width, grid.reshape(2, 1, size, size))
    table = flat.to(embed.pos_embed).reshape(size, size, width)
    stored = embed.pos_embed.reshape(old, old, width)
    centre = table[margin : margin + old, margin : margin + old]
    # The formula must give back what is stored, or the continuation would not fit its edges.
    if float((centre - stored).abs().max()) > TABLE_TOLERANCE:
        raise ValueError(
            f"pos_embed_max_size: the stored table of {old} patches is not the sine-cosine table "
            "of its configuration and cannot be continued"
        )
    # The stored values and not ours, which differ by the rounding of the stored precision.
    centre.copy_(stored)
    # Persistent and in the configuration: stock diffusers then loads it without knowing of us.
    embed.register_buffer("pos_embed", table.reshape(1, size * size, width), persistent=True)
    embed.pos_embed_max_size = size
    model.register_to_config(pos_embed_max_size=size)


def check_position_table(model: Any, height: int, width: int) -> None:
    """Whether latents of height x width lie inside the table of positions.

    Raises:
        ValueError: they do not; names the setting that enlarges the table.
    """
    # The table is square, so the longer edge decides.
    patch, size = int(model.config.patch_size), int(model.config.pos_embed_max_size)
    needed = max(height, width) // patch
    if needed > size:
        # The sides must differ by an even number, or the centre would move by half a patch.
        enough = needed + (needed - size) % 2
        raise ValueError(
            f"latents of {height}x{width} need {needed} patches along an edge, SD3's table of "
            f"positions has {size}; train with models.transformer.sd3.pos_embed_max_size: {enough} "
            "or more, or leave such sizes out"
        )
