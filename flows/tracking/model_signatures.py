"""Signatures of registered models: names, shapes and types of what the networks take and give.

Read from a diffusers folder's `config.json`; no weights are loaded. -1 stands for sizes that are
free: batch, tokens, height and width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: Mapping[str, Any]) -> tuple[Shapes, Shapes] | None:
    """(inputs, outputs) by the names of the network's `forward`; None for a class unknown here."""
    kind = str(config.get("_class_name", ""))
    if kind.startswith("AutoencoderKL"):
        image = (-1, int(config["in_channels"]), -1, -1)
        return {"sample": image}, {"sample": (-1, int(config["out_channels"]), -1, -1)}
    if kind.endswith(("FluxTransformer2DModel", "SD3Transformer2DModel", "Transformer2DModel")):
        text = {
            "encoder_hidden_states": (-1, -1, int(config["joint_attention_dim"])),
            "pooled_projections": (-1, int(config["pooled_projection_dim"])),
            "timestep": (-1,),
        }
        channels = int(config["in_channels"])
        given = int(config.get("out_channels") or channels)
        if "SD3" in kind:
            latents = {"hidden_states": (-1, channels, -1, -1)}
            return {**latents, **text}, {"sample": (-1, given, -1, -1)}
        packed: Shapes = {"hidden_states": (-1, -1, channels), **text}
        packed |= {"img_ids": (-1, 3), "txt_ids": (-1, 3)}
        if config.get("guidance_embeds"):
            packed["guidance"] = (-1,)
        return packed, {"sample": (-1, -1, given)}
    return None


def signature_of(folder: Path) -> ModelSignature | None:
    """Signature of the model in a diffusers folder; None where there is none or it is unknown."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    file = folder / "config.json"
    if not file.is_file():
        return None
    shapes = tensor_shapes(json.loads(file.read_text(encoding="utf-8")))
    if shapes is None:
        return None
    single = np.dtype("float32")
    sides = [Schema([TensorSpec(single, s, name) for name, s in side.items()]) for side in shapes]
    return ModelSignature(inputs=sides[0], outputs=sides[1])
