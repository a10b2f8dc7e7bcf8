"""Diffusers folders of trained transformers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def save_transformer(module: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a diffusers folder with `weights` in place of the module's own; aside, then renamed.

    Args:
        module: the transformer whose class, configuration and buffers are used. Its parameters are
            not read, so they may be divided over the ranks.
        weights: float32 parameters by name, all of them.
        folder: replaced if it exists.
    """
    # `_name_or_path` would carry the path that the weights were loaded from.
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        model = type(module).from_config(config)
    state = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    for name, tensor in module.state_dict().items():
        if name not in state:
            state[name] = tensor.detach().cpu()
    model.load_state_dict(state, assign=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
