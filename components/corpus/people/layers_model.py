"""Networks saved by TensorFlow.js as layers models, run in plain torch.

A JSON file holds a Keras graph and a list of tensors, a second file their bytes in that order,
float32 or quantized: an 8- or 16-bit integer q stands for q * scale + min (per tensor). Keras keeps
pictures as (B, H, W, C) and kernels as (H, W, in, out); here pictures are (B, C, H, W), and only
`Flatten` has to know. The layers are those of MobileNetV2 with a head; another one is refused by
name rather than guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[list[Tensor]], Tensor]
"""A layer: its inputs -> its output."""

_DTYPES = {"float32": "<f4", "uint8": "u1", "uint16": "<u2"}


def _tensors(manifest: list[dict[str, Any]], data: bytes) -> dict[str, np.ndarray]:
    """Tensors by name, float32."""
    found: dict[str, np.ndarray] = {}
    offset = 0
    for entry in (entry for group in manifest for entry in group["weights"]):
        quantization = entry.get("quantization")
        stored = np.dtype(_DTYPES[quantization["dtype"] if quantization else entry["dtype"]])
        count = math.prod(entry["shape"])
        values = np.frombuffer(data, stored, count, offset).reshape(entry["shape"])
        if quantization:
            # In float64 and rounded once, as the library does.
            values = values * np.float64(quantization["scale"]) + np.float64(quantization["min"])
        found[entry["name"]] = values.astype(np.float32)
        offset += count * stored.itemsize
    if offset != len(data):
        raise ValueError(f"lists {offset} bytes of weights, there are {len(data)}")
    return found


@dataclass(frozen=True)
class _Layer:
    """A layer's settings and tensors, with the device that these go to."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    device: str

    def tensor(self, part: str) -> Tensor:
        return torch.tensor(self.tensors[f"{self.name}/{part}"], device=self.device)

    def only(self, **allowed: Any) -> None:
        """Refuse settings that the arithmetic here would ignore."""
        for key, value in allowed.items():
            if self.config.get(key, value) != value:
                raise ValueError(f"{key} {self.config[key]!r} is not read, only {value!r}")


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, as TensorFlow's "same": the odd one comes after."""
    # Torch's own "same" refuses strides.
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda x: x,
        "relu": F.relu,
        "relu6": F.relu6,
        "softmax": lambda x: x.softmax(-1),
    }
    if name not in known:
        raise ValueError(f"activation {name!r} is not read")
    return known[name]


def _convolution(layer: _Layer, kernel: Tensor, groups: int) -> Run:
    """kernel: (out, in / groups, height, width)."""
    config = layer.config
    layer.only(data_format="channels_last", dilation_rate=[1, 1])
    if config["padding"] not in ("same", "valid"):
        raise ValueError(f"padding {config['padding']!r} is not read")
    strides, act = tuple(config["strides"]), _activation(config["activation"])
    bias = layer.tensor("bias") if config["use_bias"] else None

    def run(inputs: list[Tensor]) -> Tensor:
        (x,) = inputs
        if config["padding"] == "same":
            top, bottom = _same_padding(x.shape[2], kernel.shape[2], strides[0])
            left, right = _same_padding(x.shape[3], kernel.shape[3], strides[1])
            x = F.pad(x, (left, right, top, bottom))
        return act(F.conv2d(x, kernel, bias, strides, groups=groups))

    return run


def _conv(layer: _Layer) -> Run:
    return _convolution(layer, layer.tensor("kernel").permute(3, 2, 0, 1).contiguous(), 1)


def _depthwise_conv(layer: _Layer) -> Run:
    layer.only(depth_multiplier=1)
    # (H, W, in, 1): one kernel per channel.
    kernel = layer.tensor("depthwise_kernel").permute(2, 3, 0, 1).contiguous()
    return _convolution(layer, kernel, kernel.shape[0])


def _zero_padding(layer: _Layer) -> Run:
    layer.only(data_format="channels_last")
    (top, bottom), (left, right) = layer.config["padding"]
    return lambda inputs: F.pad(inputs[0], (left, right, top, bottom))


def _batch_norm(layer: _Layer) -> Run:
    if layer.config["axis"] not in (-1, 3, [3]):
        raise ValueError(f"axis {layer.config['axis']!r} is not read, only the channels")
    layer.only(center=True, scale=True)
    mean, variance = layer.tensor("moving_mean"), layer.tensor("moving_variance")
    gamma, beta = layer.tensor("gamma"), layer.tensor("beta")
    epsilon = float(layer.config["epsilon"])
    return lambda inputs: F.batch_norm(inputs[0], mean, variance, gamma, beta, eps=epsilon)


def _relu(layer: _Layer) -> Run:
    layer.only(negative_slope=0, threshold=0)
    highest = layer.config.get("max_value")
    return lambda inputs: inputs[0].clamp(min=0, max=highest)


def _average_pooling(layer: _Layer) -> Run:
    layer.only(data_format="channels_last", padding="valid")
    size, strides = tuple(layer.config["pool_size"]), tuple(layer.config["strides"])
    return lambda inputs: F.avg_pool2d(inputs[0], size, strides)


def _flatten(layer: _Layer) -> Run:
    layer.only(data_format="channels_last")
    # The order of the dense layer's rows: height, width, channel.
    return lambda inputs: inputs[0].permute(0, 2, 3, 1).flatten(1)


def _dense(layer: _Layer) -> Run:
    kernel, act = layer.tensor("kernel"), _activation(layer.config["activation"])
    bias = layer.tensor("bias") if layer.config["use_bias"] else torch.zeros(())
    return lambda inputs: act(inputs[0] @ kernel + bias)


_LAYERS: dict[str, Callable[[_Layer], Run]] = {
    "Add": lambda layer: lambda inputs: torch.stack(inputs).sum(0),
    "AveragePooling2D": _average_pooling,
    "BatchNormalization": _batch_norm,
    "Conv2D": _conv,
    "Dense": _dense,
    "DepthwiseConv2D": _depthwise_conv,
    # Only training drops anything.
    "Dropout": lambda layer: lambda inputs: inputs[0],
    "Flatten": _flatten,
    "ReLU": _relu,
    "ZeroPadding2D": _zero_padding,
}


@dataclass(frozen=True)
class LayersModel:
    """A network with one input and one output."""

    source: str
    """Name of the input layer."""
    output: str
    input_hw: tuple[int, int]
    """Height and width of the pictures that it was trained on."""
    layers: tuple[tuple[str, tuple[str, ...], Run], ...]
    """(name, names of the inputs, what it computes), each after its inputs."""

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) float32 -> (B, classes)."""
        values = {self.source: pictures}
        for name, inputs, run in self.layers:
            values[name] = run([values[each] for each in inputs])
        return values[self.output]


def _inputs(entry: Mapping[str, Any]) -> tuple[str, ...]:
    nodes = entry["inbound_nodes"]
    if len(nodes) != 1 or any(node[1:3] != [0, 0] for node in nodes[0]):
        raise ValueError("it is used more than once, or takes one of several outputs")
    return tuple(node[0] for node in nodes[0])


def _build(values: Mapping[str, Any], data: bytes, device: str) -> LayersModel:
    config = values["modelTopology"]["model_config"]["config"]
    tensors = _tensors(values["weightsManifest"], data)
    first, *others = config["layers"]
    if first["class_name"] != "InputLayer":
        raise ValueError(f"the first layer is a {first['class_name']}, expected an InputLayer")
    _, height, width, _ = first["config"]["batch_input_shape"]
    layers: list[tuple[str, tuple[str, ...], Run]] = []
    for entry in others:
        name, kind = entry["config"]["name"], entry["class_name"]
        if kind not in _LAYERS:
            raise ValueError(f"layer {name}: {kind} is not read, only {', '.join(_LAYERS)}")
        try:
            run = _LAYERS[kind](_Layer(name, entry["config"], tensors, device))
            layers.append((name, _inputs(entry), run))
        except ValueError as problem:
            raise ValueError(f"layer {name}: {problem}") from None
    ((output, *_),) = config["output_layers"]
    return LayersModel(first["config"]["name"], output, (height, width), tuple(layers))


def read_layers_model(graph: Path, weights: Path, device: str = "cpu") -> LayersModel:
    """A network from its two files.

    Args:
        graph: JSON, `modelTopology` and `weightsManifest`.
        weights: all shards of the manifest, one behind the other.
        device: "cpu" or "cuda".

    Raises:
        ValueError: not such a model, or one with layers or settings that are not read here.
        OSError: a file is missing.
    """
    text, data = graph.read_bytes(), weights.read_bytes()
    where = f"{graph.parent.name}/{graph.name}"
    try:
        return _build(json.loads(text), data, device)
    except (LookupError, TypeError) as problem:
        kind = type(problem).__name__
        raise ValueError(f"{where}: not a layers model ({kind}: {problem})") from None
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from None
