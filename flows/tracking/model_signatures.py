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

from components.models.backbone import Shapes
from components.models.backbones import backbone_of_class

if TYPE_CHECKING:
    from mlflow.models import ModelSignature


def tensor_shapes(config: Mapping[str, Any]) -> tuple[Shapes, Shapes] | None:
    """(inputs, outputs) by the names of the network's `forward`; None for a class unknown here."""
    kind = str(config.get("_class_name", ""))
    if kind.startswith("AutoencoderKL"):
        image = (-1, int(config["in_channels"]), -1, -1)
        return {"sample": image}, {"sample": (-1, int(config["out_channels"]), -1, -1)}
    backbone = backbone_of_class(kind)
    return None if backbone is None else backbone.tensor_shapes(config)


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
    # Of the interface; weights may be stored in bfloat16, for which MLflow has no name.
    single = np.dtype("float32")
    sides = [Schema([TensorSpec(single, s, name) for name, s in side.items()]) for side in shapes]
    return ModelSignature(inputs=sides[0], outputs=sides[1])
