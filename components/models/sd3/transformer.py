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
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid

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
    spacing = embed.base_size / old / embed.interpolation_scale
    positions = (torch.arange(size, dtype=torch.float32) - margin) * spacing
    # diffusers' order: the first half of the channels is the column's.
    grid = torch.stack(torch.meshgrid(positions, positions, indexing="xy"))
    flat = get_2d_sincos_pos_embed_from_grid(width, grid.reshape(2, 1, size, size))
    table = flat.to(embed.pos_embed).reshape(size, size, width)
    stored = embed.pos_embed.reshape(old, old, width)
    centre = table[margin : margin + old, margin : margin + old]
    if float((centre - stored).abs().max()) > TABLE_TOLERANCE:
        raise ValueError(
            f"pos_embed_max_size: the stored table of {old} patches is not the sine-cosine table "
            "of its configuration and cannot be continued"
        )
    centre.copy_(stored)
    embed.register_buffer("pos_embed", table.reshape(1, size * size, width), persistent=True)
    embed.pos_embed_max_size = size
    model.register_to_config(pos_embed_max_size=size)


def check_position_table(model: Any, height: int, width: int) -> None:
    """Whether latents of height x width lie inside the table of positions.

    Raises:
        ValueError: they do not; names the setting that enlarges the table.
    """
    patch, size = int(model.config.patch_size), int(model.config.pos_embed_max_size)
    needed = max(height, width) // patch
    if needed > size:
        enough = needed + (needed - size) % 2
        raise ValueError(
            f"latents of {height}x{width} need {needed} patches along an edge, SD3's table of "
            f"positions has {size}; train with models.transformer.sd3.pos_embed_max_size: {enough} "
            "or more, or leave such sizes out"
        )
