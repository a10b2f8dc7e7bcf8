"""Flux weights under the names and in the matrices of the original code, as one file has them.

The inverse of `single_file.convert_original`: query, key, value (and a single block's MLP) become
one matrix again, and the rows of the last modulation change places. Values are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from components.models.loading import single_file

_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_OUTSIDE = {new: old for old, new in single_file._RENAMED.items()}
_DOUBLE = {new: old for old, new in single_file._DOUBLE.items()}
_SINGLE = {new: old for old, new in single_file._SINGLE.items()}
_JOINED = {
    (is_single, part): (whole, place)
    for whole, parts in single_file._SPLIT.items()
    for place, part in enumerate(parts)
    for is_single in (whole == "linear1",)
}
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def original_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original keys from the state dict of a FluxTransformer2DModel.

    Raises:
        ValueError: a tensor that the original code has no counterpart of; names it.
    """
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(module)
        if block is None:
            if module not in _OUTSIDE:
                raise ValueError(f"{name}: no tensor of Flux' original code")
            if module == "norm_out.linear":
                scale, shift = tensor.chunk(2)
                tensor = torch.cat((shift, scale))
            found[f"{_OUTSIDE[module]}.{kind}"] = tensor
            continue
        is_single, part = bool(block[1]), block[3]
        target = f"{'single' if is_single else 'double'}_blocks.{block[2]}."
        if (is_single, part) in _JOINED:
            whole, place = _JOINED[is_single, part]
            parts.setdefault(f"{target}{whole}.{kind}", {})[place] = tensor
            continue
        renamed = (_SINGLE if is_single else _DOUBLE).get(part)
        if renamed is None:
            raise ValueError(f"{name}: no tensor of Flux' original code")
        is_norm = part.rpartition(".")[2] in _NORMS
        found[f"{target}{renamed}.{'scale' if is_norm else kind}"] = tensor
    for name, members in parts.items():
        found[name] = torch.cat([members[place] for place in sorted(members)])
    return found
