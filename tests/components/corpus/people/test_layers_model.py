from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_layers_model import EDGE, slow_reference, tiny_model

from components.corpus.people.layers_model import read_layers_model


def written(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> list[Path]:
    """Graph and weights of the tiny network, the graph changed beforehand."""
    model, weights, _ = tiny_model()
    if change is not None:
        change(model)
    paths = [folder / "model.json", folder / "weights.bin"]
    paths[0].write_text(json.dumps(model))
    paths[1].write_bytes(weights)
    return paths


def test_a_network_with_every_layer_equals_its_slow_reference(tmp_path: Path) -> None:
    pictures = np.random.default_rng(1).random((2, EDGE, EDGE, 3)).astype(np.float32)
    model = read_layers_model(*written(tmp_path))
    assert model.input_hw == (EDGE, EDGE)
    found = model(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    tensors = tiny_model()[2]
    for picture, row in zip(pictures, found.numpy(), strict=True):
        expected = slow_reference(picture, tensors)
        # Not the answer to everything: the classes differ, and so do the pictures.
        assert np.ptp(expected) > 0.05
        np.testing.assert_allclose(row, expected, atol=2e-6)
    assert not np.allclose(found[0], found[1], atol=1e-4)


def _layer(model: dict[str, Any], name: str) -> dict[str, Any]:
    layers = model["modelTopology"]["model_config"]["config"]["layers"]
    found: dict[str, Any] = next(layer for layer in layers if layer["name"] == name)
    return found


@pytest.mark.parametrize(
    ("layer", "key", "value", "line"),
    [
        ("stem", "data_format", "channels_first", "data_format 'channels_first' is not read"),
        ("stem", "dilation_rate", [2, 2], r"dilation_rate \[2, 2\] is not read"),
        ("stem", "padding", "causal", "padding 'causal' is not read"),
        ("stem", "activation", "swish", "activation 'swish' is not read"),
        ("deep", "depth_multiplier", 2, "depth_multiplier 2 is not read, only 1"),
        ("deep_bn", "axis", 1, "axis 1 is not read"),
        ("deep_bn", "scale", False, "scale False is not read"),
        ("stem_relu", "negative_slope", 0.1, "negative_slope 0.1 is not read"),
        ("stem_relu", "threshold", 1, "threshold 1 is not read"),
        ("pool", "padding", "same", "padding 'same' is not read"),
    ],
)
def test_settings_that_would_be_ignored_are_refused_with_the_layer(
    tmp_path: Path, layer: str, key: str, value: Any, line: str
) -> None:
    def change(model: dict[str, Any]) -> None:
        _layer(model, layer)["config"][key] = value

    paths = written(tmp_path, change)
    with pytest.raises(ValueError, match=rf"model\.json: layer {layer}: {line}"):
        read_layers_model(*paths)


def test_an_unknown_layer_a_shared_layer_and_missing_tensors_are_one_line(tmp_path: Path) -> None:
    def unknown(model: dict[str, Any]) -> None:
        _layer(model, "pool")["class_name"] = "MaxPooling2D"

    def shared(model: dict[str, Any]) -> None:
        _layer(model, "pool")["inbound_nodes"] *= 2

    def short(model: dict[str, Any]) -> None:
        del model["weightsManifest"][1]["weights"][-1]

    def nameless(model: dict[str, Any]) -> None:
        model["weightsManifest"][0]["weights"][0]["name"] = "other"

    def empty(model: dict[str, Any]) -> None:
        model.clear()

    for change, line in (
        (unknown, "layer pool: MaxPooling2D is not read, only Add, Average"),
        (shared, "layer pool: it is used more than once"),
        (short, r"lists \d+ bytes of weights, there are \d+"),
        (nameless, r"not a layers model \(KeyError: 'stem/kernel'\)"),
        (empty, r"not a layers model \(KeyError: 'modelTopology'\)"),
    ):
        paths = written(tmp_path, change)
        with pytest.raises(ValueError, match=line):
            read_layers_model(*paths)
    paths[0].write_text("{")
    with pytest.raises(ValueError, match=r"model\.json: "):
        read_layers_model(*paths)
