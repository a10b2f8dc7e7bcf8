"""What a safetensors checkpoint holds, read from its headers, against what a model needs.

diffusers and transformers load a checkpoint with missing tensors and only warn: the rest stays
random. Here names and shapes are compared before any weight is read, and every problem is one line
that names file and tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from components.files.weight_folders import PICKLED_SUFFIXES, WeightsMissing

Shapes = Mapping[str, tuple[int, ...]]
_NAMED = 3
"""Tensors that a message lists before it only counts."""


class WeightsBroken(ValueError):
    """The files are there and cannot be these weights; one line."""


def file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one safetensors file, without reading the tensors.

    Raises:
        WeightsBroken: pickled, truncated or otherwise not a safetensors file.
    """
    if path.suffix in PICKLED_SUFFIXES:
        raise WeightsBroken(
            f"{path}: pickled weights can run code and are not loaded; get the .safetensors file"
        )
    try:
        # get_slice knows shapes from the header; get_tensor would read the weights.
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        detail = " ".join(str(problem).split())
        raise WeightsBroken(
            f"{path}: not a readable safetensors file ({detail}); {_remedy(path)}"
        ) from None


def _remedy(path: Path) -> str:
    """What helps, by the first bytes of a file that is no safetensors file."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(64)
    if start.startswith(b"GGUF"):
        return "it is a GGUF file: name it .gguf"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: run `git lfs pull`, or download the file itself"
    if start.startswith(b"PK\x03\x04"):
        return "it is a file of torch.save, which can run code: get the .safetensors file"
    return "download it again"


def folder_shapes(folder: Path, what: str, command: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model folder: one file, or the shards that its index names.

    Args:
        folder: with `*.safetensors` and, for shards, `*.safetensors.index.json`.
        what: name of the weights for messages.
        command: how to get them.

    Raises:
        WeightsMissing: no weights, or a shard that the index names is not there.
        WeightsBroken: a file cannot be read, or a shard does not hold what the index says.
    """
    # Variants such as diffusion_pytorch_model.fp16.safetensors are not what from_pretrained reads.
    names = ("diffusion_pytorch_model.safetensors", "model.safetensors")
    # The index comes first, as in diffusers: where both are there, the shards are what is loaded.
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shard_shapes(index, what, command)
        if (folder / name).is_file():
            return file_shapes(folder / name)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    reason = f"{_listed(others)} is not read: rename it, or copy" if others else "no such file"
    raise WeightsMissing(what, folder / names[0], command, reason)


def _shard_shapes(index: Path, what: str, command: str) -> dict[str, tuple[int, ...]]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise WeightsBroken(f"{index}: not an index of shards; download it again") from None
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        path = index.parent / shard
        # An index is foreign data: "../" in it would read files outside the folder.
        if Path(shard).name != shard:
            raise WeightsBroken(f"{index}: shard {shard!r} is not a file name")
        if not path.is_file():
            raise WeightsMissing(what, path, command, "named by the index of shards")
        held = file_shapes(path)
        # A shard of another model may have the same file name and be readable.
        absent = [name for name, place in places.items() if place == shard and name not in held]
        if absent:
            raise WeightsBroken(f"{path}: the index expects {_listed(absent)}; download it again")
        # What a shard holds beyond the index is taken too, so that it is named as unknown later.
        shapes |= held
    return shapes


def require_shapes(needed: Shapes, found: Shapes, where: str | Path) -> None:
    """Check that a checkpoint holds exactly the tensors of a model.

    Args:
        needed: the model's state dict.
        found: the checkpoint's.
        where: path for the message.

    Raises:
        WeightsBroken: tensors are missing, unknown, or have another shape; names the first few.
    """
    # All kinds of problems in one message: they tell a wrong model from a damaged one.
    problems = []
    if missing := [name for name in needed if name not in found]:
        problems.append(f"{len(missing)} tensors are missing ({_listed(missing)})")
    if unknown := [name for name in found if name not in needed]:
        problems.append(f"{len(unknown)} tensors are unknown ({_listed(unknown)})")
    wrong = [
        f"{name} is {found[name]}, the configuration needs {shape}"
        for name, shape in needed.items()
        if name in found and found[name] != tuple(shape)
    ]
    if wrong:
        problems.append(f"{len(wrong)} have another shape ({_listed(wrong)})")
    if problems:
        raise WeightsBroken(f"{where}: {'; '.join(problems)}")


def check_folder(folder: Path, model: type[Any], what: str, **changes: Any) -> None:
    """Compare a diffusers folder's tensors with what its own configuration needs.

    Args:
        folder: with config.json and safetensors.
        model: diffusers class.
        what: name of the weights for messages.
        **changes: entries that replace those of the configuration.

    Raises:
        WeightsMissing: no weights.
        WeightsBroken: an unusable configuration, or tensors missing, unknown or misshapen.
    """
    shapes = folder_shapes(folder, what, f"download {what} again")
    try:
        # Names and shapes without storage: Flux' 12B parameters would take 48 GB.
        with torch.device("meta"):
            empty = model.from_config(model.load_config(folder), **changes)
    except Exception as problem:
        # Whatever a foreign value meets first in the model's constructor.
        said = " ".join(str(problem).split()) or type(problem).__name__
        raise WeightsBroken(f"{folder}/config.json: {said}") from None
    needed = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    require_shapes(needed, shapes, folder)


def require_finite(model: torch.nn.Module, where: str | Path) -> None:
    """Refuse weights that are no numbers, from which training would learn nothing.

    Raises:
        WeightsBroken: a tensor holds a value that is infinite or NaN; names it.
    """
    # By the sum, which such a value always spoils: one pass without a copy, over gigabytes.
    wrong = [
        name
        for name, tensor in model.state_dict().items()
        if not tensor.sum().isfinite() and not tensor.isfinite().all()
    ]
    if wrong:
        raise WeightsBroken(
            f"{where}: {len(wrong)} tensors hold values that are not finite ({_listed(wrong)}); "
            "download or train them again"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
