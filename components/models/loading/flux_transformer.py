"""A Flux transformer from a folder (ours or stock, sharded or not) or from one file."""

from __future__ import annotations

from pathlib import Path

import torch

from components.files.weight_folders import require_class
from components.models.checkpoint_files import check_folder
from components.models.loading.gguf_file import SUFFIX as GGUF_SUFFIX
from components.models.loading.gguf_file import load_gguf
from components.models.loading.single_file import load_single_file
from components.models.resonance_rope import RopeVariant
from components.models.transformer import UltraFluxTransformer2DModel

TRANSFORMER_CLASSES = ("UltraFluxTransformer2DModel", "FluxTransformer2DModel")


def load_transformer(
    path: Path, *, dtype: torch.dtype, rope_variant: RopeVariant | None = None
) -> UltraFluxTransformer2DModel:
    """A transformer from a folder (ours or stock Flux, sharded or not) or a single file.

    Args:
        path: folder, `.safetensors` or `.gguf` file.
        dtype: of the weights.
        rope_variant: None: what our configuration or file says, `official` for stock ones.

    Raises:
        WeightsMissing: a file is not there.
        WeightsBroken: unreadable files, or tensors missing, unknown or misshapen; names them.
        ValueError: the folder holds another class.
    """
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return load_gguf(path, dtype=dtype, rope_variant=rope_variant or "official")
    if path.is_file():
        return load_single_file(path, dtype=dtype, rope_variant=rope_variant)
    require_class(path, None, TRANSFORMER_CLASSES)
    # Passed only where asked for: a value would replace what an exported folder was trained with.
    changes = {"rope_variant": rope_variant} if rope_variant is not None else {}
    # Before from_pretrained, which only warns about tensors that it does not find.
    check_folder(path, UltraFluxTransformer2DModel, "transformer")
    return UltraFluxTransformer2DModel.from_pretrained(
        path, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **changes
    ).eval()
