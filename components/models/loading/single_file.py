"""A Flux transformer in one safetensors file: the original key layout, or diffusers' own.

The original layout (black-forest-labs/flux) keeps q, k and v in one matrix, joins the single
blocks' MLP input to it, and stores the last modulation as (shift, scale) where diffusers wants
(scale, shift). Sizes are read off the tensors, so that checkpoints of any width load. In fp8, with
a scale for each matrix or without, weights are widened as they are read.

Deviation: diffusers' own converter assumes a width of 3072; at that width the two are equal
(tested on every tensor).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from safetensors.torch import load_file
from torch import Tensor

from components.files.safetensors_header import metadata_of
from components.models.checkpoint_files import WeightsBroken, file_shapes, require_shapes
from components.models.resonance_rope import RopeVariant
from components.models.transformer import UltraFluxTransformer2DModel

# What checkpoint collections put before every key.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_RENAMED = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_SPLIT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
# Of fp8 files that ComfyUI calls scaled: what a matrix is multiplied by, in two generations of
# names; and what only their own kernels need.
_SCALES = (".scale_weight", ".weight_scale")
_KERNELS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_ADAPTER = ("lora_", ".lora", "hada_w", "lokr_w", ".diff_b")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_OURS = "ultraflux."
# Rotary channels per head in Flux: 16 + 56 + 56 of 128.
_AXIS_SHARES = (2, 7, 7)


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without what collections put before the transformer's keys."""
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            # Keys without it belong to other networks of an all-in-one file (autoencoder, text
            # encoders).
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
    return dict(state)


def unscaled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a scaled fp8 file as float32; every other state as it is.

    Raises:
        WeightsBroken: a scale without its fp8 matrix, or of a block of numbers; names it.
    """
    found = {name: tensor for name, tensor in state.items() if not name.endswith(_KERNELS)}
    for name in [name for name in found if name.endswith(_SCALES)]:
        scale, of = found.pop(name), f"{name.rpartition('.')[0]}.weight"
        if of not in found or found[of].dtype not in _FP8 or scale.numel() != 1:
            raise WeightsBroken(f"{name}: only fp8 with one scale for a matrix is read")
        found[of] = found[of].float() * scale.float().reshape(())
    return found


def is_original_layout(names: Mapping[str, Any]) -> bool:
    """Whether (prefix-free) keys are in the original layout."""
    return any(name.startswith(("double_blocks.", "single_blocks.")) for name in names)


def refuse_others(names: Iterable[str]) -> None:
    """Refuse what is no whole Flux transformer and says so by its names.

    Raises:
        WeightsBroken: an adapter, or weights that a library packed.
    """
    for name in names:
        if any(part in name for part in _ADAPTER):
            raise WeightsBroken(
                "an adapter (LoRA), which changes a whole transformer and is none; give the "
                "weights that it was trained on, or those that it was merged into"
            )
        if ".quant_state." in name or name.endswith((".absmax", ".qweight", ".wscales")):
            raise WeightsBroken(
                f"{name}: packed by another program; take the bfloat16 or fp8 file, and "
                "--quantise to hold it in fewer bits"
            )


def refuse_whole_numbers(state: Mapping[str, Tensor]) -> None:
    """Refuse what a cast would make weights of without a word.

    Raises:
        WeightsBroken: a tensor of whole, complex or truth values; names it.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsBroken(f"{name}: {kind}; weights are floating-point numbers")


def convert_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original keys to diffusers' keys.

    Args:
        state: without prefix; the tensors are split and reordered, never changed.

    Returns:
        State dict of FluxTransformer2DModel.

    Raises:
        WeightsBroken: a key that Flux does not have.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(module)
        if block is None:
            # Refused, not skipped: an unknown key means another architecture or an adapter.
            if module not in _RENAMED:
                raise WeightsBroken(f"{name}: not a tensor of a Flux transformer")
            # The last modulation alone: Flux has (shift, scale) there, diffusers (scale, shift).
            if module.startswith("final_layer.adaLN"):
                shift, scale = tensor.chunk(2)
                # A list: packed tensors of a GGUF file do not know themselves in a tuple.
                tensor = torch.cat([scale, shift])
            converted[f"{_RENAMED[module]}.{kind}"] = tensor
            continue
        is_double, part = block[1] == "double", block[3]
        target = f"{'' if is_double else 'single_'}transformer_blocks.{block[2]}."
        if part in _SPLIT:
            # q, k and v in a row; in single blocks what is left over is the MLP's input.
            pieces = _SPLIT[part]
            # Single blocks' fourth piece has no fixed ratio, so q, k and v are measured elsewhere.
            width = len(tensor) // 3 if len(pieces) == 3 else _width(state)
            sizes = [width, width, width, len(tensor) - 3 * width][: len(pieces)]
            for piece, values in zip(pieces, tensor.split(sizes), strict=True):
                converted[f"{target}{piece}.{kind}"] = values
            continue
        renamed = (_DOUBLE if is_double else _SINGLE).get(part)
        if renamed is None:
            raise WeightsBroken(f"{name}: not a tensor of a Flux transformer")
        # The norms' only parameter is called scale there and weight here.
        converted[f"{target}{renamed}.{'weight' if kind == 'scale' else kind}"] = tensor
    return converted


def _width(state: Mapping[str, Tensor]) -> int:
    """Channels of a token, from a tensor that has one value for each."""
    biases = ("img_in.bias", "txt_in.bias", "single_blocks.0.linear2.bias")
    for name in biases:
        if name in state:
            return len(state[name])
    raise WeightsBroken(f"none of {', '.join(biases)} is there: not a whole Flux transformer")


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Constructor arguments of the transformer, from the shapes of its diffusers-layout tensors.

    Rotary channels per axis are not in the weights: Flux's shares 2:7:7 are taken.

    Raises:
        WeightsBroken: a tensor that tells a size is missing, or all blocks of a kind.
    """

    def count(prefix: str) -> int:
        pattern = re.compile(rf"{prefix}\.(\d+)\.")
        numbers = [int(match[1]) for name in shapes if (match := pattern.match(name))]
        if not numbers:
            raise WeightsBroken(f"no tensor of {prefix}: not a whole Flux transformer")
        # Highest number and not how many: a gap in the blocks is then a missing tensor by name.
        return max(numbers) + 1

    try:
        width, in_channels = shapes["x_embedder.weight"]
        joint_dim = shapes["context_embedder.weight"][1]
        pooled_dim = shapes["time_text_embed.text_embedder.linear_1.weight"][1]
        out_channels = shapes["proj_out.weight"][0]
        norms = [name for name in shapes if name.endswith("attn.norm_q.weight")]
        head_dim = shapes[norms[0]][0]
    except (LookupError, ValueError) as problem:
        raise WeightsBroken(
            f"{problem} is missing or has another rank: not a Flux transformer"
        ) from None
    # Each axis needs an even number of channels, which rotate in pairs.
    shares = sum(_AXIS_SHARES)
    if head_dim % (2 * shares) or width % head_dim:
        raise WeightsBroken(f"heads of {head_dim} channels at width {width} are not Flux's layout")
    return {
        "in_channels": in_channels,
        # None as in published configurations, so that a saved copy has the same config.json.
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": count("transformer_blocks"),
        "num_single_layers": count("single_transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": joint_dim,
        "pooled_projection_dim": pooled_dim,
        # Only distilled models (dev) have it; schnell's files are told apart by its absence.
        "guidance_embeds": any("guidance_embedder" in name for name in shapes),
        "axes_dims_rope": tuple(share * head_dim // shares for share in _AXIS_SHARES),
    }


def rope_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """What a file in the original layout has to say of positions, which no tensor does."""
    found = {name: str(config[name]) for name in ("rope_variant", "rope_window") if name in config}
    if "axes_dims_rope" in config:
        found["axes_dims_rope"] = ",".join(str(one) for one in config["axes_dims_rope"])
    return {f"{_OURS}{name}": value for name, value in found.items()}


def said_rope(about: Mapping[str, str]) -> dict[str, Any]:
    """Constructor arguments from `rope_metadata`; none of what a file does not say.

    Raises:
        WeightsBroken: a value that nobody wrote.
    """
    found: dict[str, Any] = {
        name: about[f"{_OURS}{name}"]
        for name in ("rope_variant", "rope_window", "axes_dims_rope")
        if f"{_OURS}{name}" in about
    }
    try:
        if "rope_variant" in found and found["rope_variant"] not in get_args(RopeVariant):
            raise ValueError(found["rope_variant"])
        if "rope_window" in found:
            found["rope_window"] = int(found["rope_window"])
        if "axes_dims_rope" in found:
            found["axes_dims_rope"] = tuple(map(int, found["axes_dims_rope"].split(",")))
    except ValueError as problem:
        raise WeightsBroken(f"metadata on rotary positions: {problem}") from None
    return found


def load_single_file(
    path: Path, *, dtype: torch.dtype, rope_variant: RopeVariant | None = None
) -> UltraFluxTransformer2DModel:
    """A transformer from one safetensors file.

    Args:
        path: original or diffusers key layout, with or without a collection's prefix.
        dtype: of the weights.
        rope_variant: see `components.models.resonance_rope`. None: what a file of
            `weight_export.export_whole` says, `official` for others.

    Returns:
        Model in evaluation mode on the CPU.

    Raises:
        WeightsBroken: not safetensors, not a Flux transformer, or tensors missing or misshapen.
    """
    # Before any tensor is read: a pickled or truncated file is named as such.
    file_shapes(path)
    state = without_prefix(load_file(path))
    try:
        refuse_others(state)
        state = unscaled(state)
        refuse_whole_numbers(state)
        if is_original_layout(state):
            state = convert_original(state)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        config = {**transformer_config(shapes), **said_rope(metadata_of(path))}
    except (WeightsBroken, RuntimeError) as problem:
        raise WeightsBroken(f"{path}: {problem}") from None
    if rope_variant is not None:
        config["rope_variant"] = rope_variant
    # Empty and without initialisation: 12B parameters would take minutes and 48 GB.
    with init_empty_weights(), no_init_weights():
        model = UltraFluxTransformer2DModel(**config)
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    require_shapes(needed, shapes, path)
    # Contiguous: pieces of one matrix would keep the whole matrix alive when it is cast or saved.
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    # Assigned, because there is no storage to copy into.
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()
