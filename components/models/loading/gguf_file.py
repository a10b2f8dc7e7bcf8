"""A Flux transformer in a GGUF file, its weights kept in the file's 2 to 8 bits.

Published files have the original key layout. Names are converted here, as for safetensors of any
width; reading, packed linear layers and loading are diffusers' (`from_single_file` with
`GGUFQuantizationConfig`). Such a transformer samples and is not trained.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.files.install_hints import install_hint
from components.models.checkpoint_files import WeightsBroken, require_shapes
from components.models.loading.single_file import (
    convert_original,
    is_original_layout,
    refuse_others,
    transformer_config,
    without_prefix,
)
from components.models.resonance_rope import RopeVariant
from components.models.transformer import UltraFluxTransformer2DModel

SUFFIX = ".gguf"


def load_gguf(
    path: Path, *, dtype: torch.dtype, rope_variant: RopeVariant
) -> UltraFluxTransformer2DModel:
    """A transformer from one GGUF file.

    Args:
        path: original or diffusers key layout, with or without a collection's prefix.
        dtype: in which products run; packed weights keep the file's form.
        rope_variant: see `components.models.resonance_rope`; a file does not say which.

    Returns:
        Model in evaluation mode on the CPU.

    Raises:
        WeightsBroken: not GGUF, not a Flux transformer, or tensors missing or misshapen.
        ValueError: the package gguf is not installed.
    """
    try:
        state = without_prefix(_read(path))
        refuse_others(state)
        if is_original_layout(state):
            state = convert_original(state)
        shapes = {name: _shape(tensor) for name, tensor in state.items()}
        config = transformer_config(shapes)
    except (WeightsBroken, RuntimeError) as problem:
        raise WeightsBroken(f"{path}: {problem}") from None
    with torch.device("meta"):
        empty = UltraFluxTransformer2DModel(**config, rope_variant=rope_variant)
    needed = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    # Before diffusers, whose message about what is missing lists every name.
    require_shapes(needed, shapes, path)
    return _loaded(state, dict(empty.config), dtype)


def _read(path: Path) -> dict[str, Any]:
    """Tensors by name as diffusers reads them; those of linear layers packed, others whole."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(f"{path}: reading GGUF needs the package gguf: {install_hint()}") from None
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    try:
        state = load_gguf_checkpoint(str(path))
    except (ValueError, KeyError, IndexError, OverflowError) as problem:
        reason = " ".join(str(problem).split())
        raise WeightsBroken(f"not a readable GGUF file ({reason})") from None
    # Norms and biases are read by layers that know nothing of packed weights.
    return {
        name: tensor
        if len(tensor.shape) > 1 or not hasattr(tensor, "quant_type")
        else dequantize_gguf_tensor(tensor)
        for name, tensor in state.items()
    }


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Of the weights, where the tensor holds their packed bytes."""
    kind = getattr(tensor, "quant_type", None)
    if kind is None:
        return tuple(tensor.shape)
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES

    weights, size = GGML_QUANT_SIZES[kind]
    return (*tensor.shape[:-1], tensor.shape[-1] // size * weights)


def _loaded(
    state: dict[str, Any], config: dict[str, Any], dtype: torch.dtype
) -> UltraFluxTransformer2DModel:
    from diffusers import GGUFQuantizationConfig

    config = {key: value for key, value in config.items() if not key.startswith("_")}
    with tempfile.TemporaryDirectory() as folder:
        # diffusers takes the configuration from a folder, and asks a hub where there is none.
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model: UltraFluxTransformer2DModel = UltraFluxTransformer2DModel.from_single_file(
            state,
            config=folder,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            torch_dtype=dtype,
            local_files_only=True,
        )
    model.register_to_config(_name_or_path="")
    return model.eval()
