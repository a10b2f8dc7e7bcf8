"""A tiny network in the format and with the layers of nsfwjs' MobileNetV2, and its slow reference.

The reference is numpy loops over positions, written from Keras' definitions; it shares no code with
what it checks.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import tarfile
from typing import Any

import numpy as np

EDGE = 224
CLASSES = 5


def _node(kind: str, name: str, inputs: list[str], **config: Any) -> dict[str, Any]:
    nodes = [[[one, 0, 0, {}] for one in inputs]] if inputs else []
    return {
        "class_name": kind,
        "name": name,
        "config": {"name": name, **config},
        "inbound_nodes": nodes,
    }


def _graph() -> list[dict[str, Any]]:
    first = {"data_format": "channels_last"}
    conv = {**first, "dilation_rate": [1, 1], "activation": "linear", "use_bias": False}
    norm = {"axis": -1, "epsilon": 0.001, "center": True, "scale": True}
    relu6 = {"max_value": 6, "negative_slope": 0, "threshold": 0}
    pads = {"padding": [[0, 1], [0, 1]], **first}
    three = {"kernel_size": [3, 3], "depth_multiplier": 1}
    return [
        _node("InputLayer", "input", [], batch_input_shape=[None, EDGE, EDGE, 3]),
        _node("ZeroPadding2D", "pad", ["input"], **pads),
        _node("Conv2D", "stem", ["pad"], strides=[16, 16], padding="valid", **conv),
        _node("BatchNormalization", "stem_bn", ["stem"], **norm),
        _node("ReLU", "stem_relu", ["stem_bn"], **relu6),
        _node(
            "DepthwiseConv2D",
            "deep",
            ["stem_relu"],
            strides=[1, 1],
            padding="same",
            **conv,
            **three,
        ),
        _node("BatchNormalization", "deep_bn", ["deep"], **norm),
        _node("Add", "add", ["stem_relu", "deep_bn"]),
        # An even picture with "same": the odd zero comes after.
        _node("Conv2D", "down", ["add"], strides=[2, 2], padding="same", **conv),
        _node(
            "AveragePooling2D",
            "pool",
            ["down"],
            pool_size=[3, 3],
            strides=[3, 3],
            padding="valid",
            **first,
        ),
        _node("Flatten", "flat", ["pool"], **first),
        _node("Dense", "dense_1", ["flat"], activation="relu", use_bias=True),
        _node("Dropout", "dropout", ["dense_1"], rate=0.5),
        _node("Dense", "dense_2", ["dropout"], activation="softmax", use_bias=True),
    ]


_SHAPES = {
    "stem/kernel": [3, 3, 3, 4],
    "deep/depthwise_kernel": [3, 3, 4, 1],
    "down/kernel": [3, 3, 4, 6],
    # 14 by 14 after the stem, 7 by 7 after the second, 2 by 2 after the pool.
    "dense_1/kernel": [2 * 2 * 6, 8],
    "dense_1/bias": [8],
    "dense_2/kernel": [8, CLASSES],
    "dense_2/bias": [CLASSES],
}
_NORMS = ("stem_bn", "deep_bn")


def tiny_model(seed: int = 9) -> tuple[dict[str, Any], bytes, dict[str, np.ndarray]]:
    """(model.json, weights.bin, tensors by name); one tensor is float32, the others quantized."""
    rng = np.random.default_rng(seed)
    shapes = dict(_SHAPES)
    for name in _NORMS:
        shapes |= {f"{name}/{part}": [4] for part in ("gamma", "beta", "moving_mean")}
        shapes[f"{name}/moving_variance"] = [4]
    entries, data, tensors = [], b"", {}
    for name, shape in shapes.items():
        entry: dict[str, Any] = {"name": name, "shape": shape, "dtype": "float32"}
        if name == "dense_2/bias":
            values = rng.normal(size=shape).astype("<f4")
            data += values.tobytes()
        else:
            kind, most = ("uint16", 65535) if name == "down/kernel" else ("uint8", 255)
            stored = rng.integers(0, most + 1, shape).astype(kind)
            low, high = (0.2, 2.0) if name.endswith("variance") else (-0.6, 0.7)
            scale = (high - low) / most
            entry["quantization"] = {"min": low, "scale": scale, "dtype": kind}
            data += stored.astype(stored.dtype.newbyteorder("<")).tobytes()
            values = stored * scale + low
        entries.append(entry)
        tensors[name] = values.astype(np.float64)
    layers = _graph()
    config = {
        "name": "tiny",
        "layers": layers,
        "input_layers": [["input", 0, 0]],
        "output_layers": [[layers[-1]["name"], 0, 0]],
    }
    topology = {"keras_version": "2.2.4", "model_config": {"class_name": "Model", "config": config}}
    # Two groups and three shards: readers must join them.
    model = {
        "modelTopology": topology,
        "weightsManifest": [
            {"paths": ["group1-shard1of2", "group1-shard2of2"], "weights": entries[:4]},
            {"paths": ["group2-shard1of1"], "weights": entries[4:]},
        ],
    }
    return model, data, tensors


def _convolve(x: np.ndarray, kernel: np.ndarray, stride: int, deep: bool = False) -> np.ndarray:
    """(H, W, in) by (h, w, in, out), or per channel by (h, w, in, 1); no padding."""
    high, wide = kernel.shape[:2]
    rows = (x.shape[0] - high) // stride + 1
    columns = (x.shape[1] - wide) // stride + 1
    out = np.zeros((rows, columns, x.shape[2] if deep else kernel.shape[3]))
    for r in range(rows):
        for c in range(columns):
            window = x[r * stride : r * stride + high, c * stride : c * stride + wide]
            if deep:
                out[r, c] = (window * kernel[..., 0]).sum((0, 1))
            else:
                out[r, c] = np.einsum("hwi,hwio->o", window, kernel)
    return out


def _normalise(x: np.ndarray, tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    part = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(name)}
    scale = part["gamma"] / np.sqrt(part["moving_variance"] + 0.001)
    return (x - part["moving_mean"]) * scale + part["beta"]


def slow_reference(x: np.ndarray, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Classes of one picture (224, 224, 3), 0 to 1, in float64."""
    x = np.pad(x.astype(np.float64), ((0, 1), (0, 1), (0, 0)))
    x = _normalise(_convolve(x, tensors["stem/kernel"], 16), tensors, "stem_bn")
    stem = np.clip(x, 0, 6)
    deep = _convolve(
        np.pad(stem, ((1, 1), (1, 1), (0, 0))), tensors["deep/depthwise_kernel"], 1, deep=True
    )
    x = stem + _normalise(deep, tensors, "deep_bn")
    assert x.shape[0] % 2 == 0
    x = _convolve(np.pad(x, ((0, 1), (0, 1), (0, 0))), tensors["down/kernel"], 2)
    pooled = np.zeros((2, 2, x.shape[2]))
    for r in range(2):
        for c in range(2):
            pooled[r, c] = x[3 * r : 3 * r + 3, 3 * c : 3 * c + 3].mean((0, 1))
    hidden = np.maximum(pooled.reshape(-1) @ tensors["dense_1/kernel"] + tensors["dense_1/bias"], 0)
    logits = hidden @ tensors["dense_2/kernel"] + tensors["dense_2/bias"]
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def squashed(pixels: np.ndarray, edge: int = EDGE) -> np.ndarray:
    """Bilinear with aligned corners, position by position, 0 to 1."""
    height, width = pixels.shape[:2]
    values = pixels.astype(np.float64) / 255
    out = np.zeros((edge, edge, 3))
    for r in range(edge):
        for c in range(edge):
            y, x = r * (height - 1) / (edge - 1), c * (width - 1) / (edge - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = values[top, left] * (1 - x + left) + values[top, right] * (x - left)
            lower = values[bottom, left] * (1 - x + left) + values[bottom, right] * (x - left)
            out[r, c] = upper * (1 - y + top) + lower * (y - top)
    return out


HEAD = '!function(e){if("object"==typeof exports)module.exports=e()}(function(){return({1:[function'
TAIL = "},{}]},{},[1])(1)});"


def minified(value: Any) -> str:
    """A value as a minifier writes it: bare keys, !0 and !1, no zero before a point."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    strings: list[str] = []

    def keep(found: re.Match[str]) -> str:
        strings.append(found.group())
        return f"\0{len(strings) - 1}\0"

    text = re.sub(r'"(?:[^"\\]|\\.)*"', keep, text)
    text = text.replace("true", "!0").replace("false", "!1")
    text = re.sub(r"(?<![\d.])0\.(?=\d)", ".", text)
    text = re.sub(r"\0(\d+)\0", lambda found: strings[int(found.group(1))], text)
    return re.sub(r'"([A-Za-z_]\w*)":', r"\1:", text)


def module(value: Any) -> bytes:
    """A bundled module that exports a value."""
    return f"{HEAD}(e,a,n){{a.exports={minified(value)}{TAIL}".encode()


def archive_bytes(members: dict[str, bytes]) -> bytes:
    """An npm archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def tiny_members(network: str = "package/tiny") -> dict[str, bytes]:
    """The tiny network as the npm package holds the true one, in three shards."""
    model, weights, _ = tiny_model()
    cuts = (0, 100, len(weights) // 2, len(weights))
    shards = [name for group in model["weightsManifest"] for name in group["paths"]]
    found = {"package/LICENSE": b"MIT License\n", f"{network}/model.min.js": module(model)}
    for name, start, end in zip(shards, cuts, cuts[1:], strict=False):
        content = base64.b64encode(weights[start:end]).decode()
        found[f"{network}/{name}.min.js"] = module(content)
    return found


def tiny_package_archive(network: str) -> bytes:
    """An archive that holds the tiny network below the folder `network`."""
    return archive_bytes(tiny_members(network))
