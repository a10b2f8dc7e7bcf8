"""Diffusers folders of trained transformers: weights in shards, their checksums, a model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.files.safetensors_header import describe_file
from components.files.weight_folders import weights_checksums
from components.files.whole_files import whole_folder

# Text of a model card from the configuration and the weights' checksums.
Card = Callable[[Mapping[str, Any], str], str]
CARD_FILE = "README.md"
CHECKSUM_FILE = "weights.sha256"
_GB = 10**9


def save_transformer(
    module: Any,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    max_shard_gb: float,
    card: Card,
    about: Mapping[str, str] | None = None,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """Write a diffusers folder with `weights` in place of the module's own; aside, then renamed.

    Args:
        module: the transformer whose class, configuration and buffers are used. Its parameters are
            not read, so they may be divided over the ranks.
        weights: float32 parameters by name, all of them.
        folder: replaced if it exists.
        max_shard_gb: weights above this size (GB) are divided over several files with an index.
        card: gives the model card from the configuration and the weights' checksums.
        about: metadata of every weight file.
        beside: writes further weights into the folder that it is given, before the rename.
    """
    # `_name_or_path` would carry the path that the weights were loaded from.
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    # Without memory of its own: `assign` below puts the given tensors in place.
    with torch.device("meta"):
        model = type(module).from_config(config)
    state = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    # Buffers, such as a table of positions, belong to the folder too.
    for name, tensor in module.state_dict().items():
        if name not in state:
            state[name] = tensor.detach().cpu()
    model.load_state_dict(state, assign=True)
    with whole_folder(folder) as aside:
        model.save_pretrained(aside, max_shard_size=int(max_shard_gb * _GB))
        for file in sorted(aside.glob("*.safetensors")):
            describe_file(file, about or {})
        if beside is not None:
            beside(aside)
        # After all weights are there, and before the card, which names them.
        checksums = weights_checksums(aside)
        (aside / CHECKSUM_FILE).write_text(checksums, encoding="utf-8")
        (aside / CARD_FILE).write_text(card(config, checksums), encoding="utf-8")
