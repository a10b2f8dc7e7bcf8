"""Optimizer states of N processes continued by M: ZeRO 0, 1 and 2.

ZeRO flattens each parameter group into one vector, pads it, and gives every rank an equal run of
it: float32 weights, both moments. Another number of ranks pads and cuts the same vector elsewhere,
so joining all parts and cutting again is exact. DeepSpeed's universal checkpoints do the same
through a file per parameter and state; here nothing is written: each rank reads the elements that
it needs from the (memory-mapped) files of the old ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS = "single_partition_of_fp32_groups"
PADDINGS = "group_paddings"
OPTIMIZER = "base_optimizer_state"
# Names of DeepSpeed's file of one rank, with the rank in the middle.
_RANK_FILE = re.compile(r"^(?P<head>(?:bf16_)?zero_pp_rank_)(?P<rank>\d+)(?P<tail>_.*)$")


class WorldSizeUnsupported(ValueError):
    """A checkpoint that can only be continued by as many processes as wrote it."""


def rank_files(file: Path, processes: int) -> list[Path]:
    """The optimizer files of all ranks that wrote the checkpoint, given the name of one of them.

    Raises:
        ValueError: the file's name has no rank.
    """
    found = _RANK_FILE.match(file.name)
    if found is None:
        raise ValueError(f"{file.name}: not the file of one rank")
    names = (f"{found['head']}{rank}{found['tail']}" for rank in range(processes))
    return [file.with_name(name) for name in names]


def cut(parts: Sequence[Tensor], start: int, length: int, stored: int) -> Tensor:
    """Elements of a vector that lies in parts.

    Args:
        parts: (n_i,) each, in order, without padding.
        start: first element wanted, may lie behind the end.
        length: elements wanted; those behind the end are left out.
        stored: size of the result; what is left is zero (the padding).

    Returns:
        (stored,), dtype of the parts.
    """
    result = torch.zeros(stored, dtype=parts[0].dtype)
    offset = 0
    # Only the parts that overlap are read; with memory mapping the others stay on the disk.
    for part in parts:
        low, high = max(start, offset), min(start + length, offset + part.numel())
        if low < high:
            result[low - start : high - start] = part[low - offset : high - offset]
        offset += part.numel()
    return result


def repartition(
    saved: Sequence[Mapping[str, Any]], here: Mapping[str, Any], rank: int
) -> dict[str, Any]:
    """The optimizer state that `rank` would have saved.

    Args:
        saved: `optimizer_state_dict` of every old rank, in rank order.
        here: `optimizer.state_dict()` of this rank, which tells how it is cut now.
        rank: this rank.

    Raises:
        WorldSizeUnsupported: a state that is not one value per weight (8-bit moments).
    """
    weights, moments = [], {}
    for group in range(len(here[WEIGHTS])):
        # Old padding lies at the end of the joined vector and has another length now.
        lean_parts = [_without_padding(state, group) for state in saved]
        sizes = [part.numel() for part in lean_parts]
        padding = int(here[PADDINGS][group])
        # Some DeepSpeed optimizers store the weights with their padding, some without.
        stored = here[WEIGHTS][group].numel()
        # With padding all ranks' runs are of one length, which tells where this one starts.
        whole = stored if _is_padded(saved[0]) else stored + padding
        weights.append(cut(lean_parts, rank * whole, whole, stored))
        # ZeRO has one flat parameter a group, under one name in every file.
        name = saved[0][OPTIMIZER]["param_groups"][group]["params"][0]
        # An optimizer that has not stepped has no state yet.
        states = [state[OPTIMIZER]["state"].get(name, {}) for state in saved]
        moments[name] = {
            key: _moment([state[key] for state in states], sizes, rank * whole, whole, key)
            for key in states[0]
        }
    # What is not replaced below describes how this rank is cut now.
    result = dict(here)
    result[WEIGHTS] = weights
    groups = saved[0][OPTIMIZER]["param_groups"]
    result[OPTIMIZER] = {"state": moments, "param_groups": groups}
    return result


def _is_padded(state: Mapping[str, Any]) -> bool:
    """Whether the weights are stored with their padding (bf16 without ZeRO)."""
    return "zero_stage" not in state


def _without_padding(state: Mapping[str, Any], group: int) -> Tensor:
    weights: Tensor = state[WEIGHTS][group]
    padding = int(state[PADDINGS][group]) if _is_padded(state) else 0
    return weights[: weights.numel() - padding]


def _moment(parts: Sequence[Any], sizes: Sequence[int], start: int, whole: int, key: str) -> Any:
    """One optimizer state of a group: cut where it has a value per weight, else the first's."""
    first = parts[0]
    # Step counters and the like are equal on all ranks.
    if not isinstance(first, Tensor) or first.dim() == 0:
        return first
    # The scales of 8-bit moments stand for a block each: cut elsewhere they mean nothing.
    if any(part.dim() != 1 or part.numel() < size for part, size in zip(parts, sizes, strict=True)):
        raise WorldSizeUnsupported(
            f"optimizer state {key} has not one value per weight, so this checkpoint can only be "
            f"continued by {len(parts)} processes"
        )
    lean = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    return cut(lean, start, whole, whole)
