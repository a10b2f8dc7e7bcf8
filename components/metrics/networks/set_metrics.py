"""FID, KID and FD-DINOv2 as set metrics: a network with its preprocessing, and a distance.

Metrics with the same `feature_id` share stored features: FID, rFID and KID read one pass of the
network over a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from components.images.arrays import ImageArray
from components.metrics.networks.frechet import (
    GramFrechet,
    GramKernel,
    extrapolated_frechet_distance,
    frechet_distance,
    kernel_distance,
    kernel_distance_spread,
)
from components.metrics.networks.inception import (
    FEATURES,
    INPUT_PX,
    FidInception,
    bilinear_without_antialias,
    clean_resize,
    grid_patches,
    normalised,
)

if TYPE_CHECKING:
    from components.metrics.metric import Picture, PooledDistance

Features = npt.NDArray[np.float32]
Preprocessing = Literal["noantialias", "clean", "patch299"]

DINO_INPUT_PX = 224
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
_PATCHES_AT_ONCE = 16
_MIN_KID_ROWS = 4

Distances = Callable[[Features, Features], dict[str, float]]


@dataclass(frozen=True)
class FeatureMetric:
    """`metrics.SetMetric` from a feature function and a distance."""

    ids: tuple[str, ...]
    feature_id: str
    weights_digest: str | None
    extract: Callable[[ImageArray], Features]
    distances: Distances
    pools: Mapping[str, Callable[[Features], PooledDistance]] = field(default_factory=dict)
    """By id: prepares a pool of rows once for many distances between its subsets."""

    def features(self, rgb: ImageArray, picture: Picture) -> Features:
        """See `SetMetric.features`; the picture beyond its pixels is not used."""
        return self.extract(rgb)

    def combine(self, ours: Features, theirs: Features) -> dict[str, float]:
        """See `SetMetric.combine`."""
        return self.distances(ours, theirs)

    def pooled(self, pool: Features) -> dict[str, PooledDistance]:
        """See `PooledSetMetric.pooled`."""
        # Each prepares its own matrix of the pool: Gram for Fréchet, kernel for KID.
        return {metric_id: prepare(pool) for metric_id, prepare in self.pools.items()}


def _kid(ours: Features, theirs: Features) -> tuple[float, float | None]:
    # Below four rows two halves hold one row each, which has no unbiased estimate.
    spread = None
    if min(len(ours), len(theirs)) >= _MIN_KID_ROWS:
        spread = kernel_distance_spread(ours, theirs)[1]
    return kernel_distance(ours, theirs), spread


def frechet_and_kernel(frechet_id: str, kernel_id: str) -> Distances:
    """Both distances; `{kernel_id}_spread` too, where a set has the four rows that it needs."""

    def distances(ours: Features, theirs: Features) -> dict[str, float]:
        kid, spread = _kid(ours, theirs)
        values = {frechet_id: frechet_distance(ours, theirs), kernel_id: kid}
        return values if spread is None else values | {f"{kernel_id}_spread": spread}

    return distances


def frechet_only(metric_id: str) -> Distances:
    """The Fréchet distance under one id."""
    return lambda ours, theirs: {metric_id: frechet_distance(ours, theirs)}


def extrapolated_only(metric_id: str) -> Distances:
    """The Fréchet distance read off at infinitely many pictures, under one id."""
    return lambda ours, theirs: {metric_id: extrapolated_frechet_distance(ours, theirs)}


class InceptionFeatures:
    """The FID network behind one of three preprocessings."""

    def __init__(self, network: FidInception, preprocessing: Preprocessing, device: str) -> None:
        """Move the network.

        Args:
            network: with its weights.
            preprocessing: how an image becomes 299 px.
            device: where the network runs.
        """
        self._network = network.to(device)
        self._preprocessing = preprocessing
        self._device = device

    @torch.inference_mode()
    def __call__(self, rgb: ImageArray) -> Features:
        """(k, 2048): one row, or one per patch (none for an image without a full patch)."""
        # Each of the three is a protocol of its own: they see different pictures at 4096 px.
        if self._preprocessing == "noantialias":
            inputs = [bilinear_without_antialias(rgb)]
        elif self._preprocessing == "clean":
            inputs = [clean_resize(rgb)]
        else:
            inputs = [patch.astype(np.float32) for patch in grid_patches(rgb)]
        # An empty block first: an image without a full patch has no rows, and that is no error.
        rows = [np.zeros((0, FEATURES), np.float32)]
        for start in range(0, len(inputs), _PATCHES_AT_ONCE):
            batch = torch.cat([normalised(x) for x in inputs[start : start + _PATCHES_AT_ONCE]])
            # float32 on the CPU, whatever the device: these are stored and read elsewhere.
            rows.append(self._network(batch.to(self._device)).float().cpu().numpy())
        return np.concatenate(rows)


def load_inception(file: Path) -> FidInception:
    """The network with the weights of the pytorch-fid project's file.

    Raises:
        ValueError: the file holds another network.
    """
    network = FidInception()
    state = torch.load(file, map_location="cpu", weights_only=True)
    # Not strict, because of the counters; what else is missing is refused below.
    found = network.net.load_state_dict(state, strict=False)
    # The counters of batches are not in the file and not used.
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        first = (missing + list(found.unexpected_keys))[0]
        raise ValueError(f"{file}: not the FID InceptionV3, first difference at {first}")
    return network


def inception_metric(
    ids: tuple[str, ...],
    preprocessing: Preprocessing,
    distances: Distances,
    *,
    pooled: bool = True,
) -> Callable[[Path, str, str], FeatureMetric]:
    """Opens a metric on the FID network: (file, digest, device) -> metric.

    Args:
        ids: a Fréchet distance, then perhaps a kernel distance and its spread.
        preprocessing: how an image becomes 299 px.
        distances: that yield the ids.
        pooled: whether the first ids are the plain distances, which tests may take from a pool.
    """

    def open_it(file: Path, digest: str, device: str) -> FeatureMetric:
        features = InceptionFeatures(load_inception(file), preprocessing, device)
        size = "" if preprocessing == "patch299" else f"-{INPUT_PX}"
        # The key of stored features. Whoever changes the preprocessing has to change it, or old
        # rows are read as new ones.
        feature_id = f"inception2048/{preprocessing}{size}/v1"
        # A third id is the spread, which is no distance.
        prepare: tuple[Callable[[Features], PooledDistance], ...] = (GramFrechet, GramKernel)
        pools = dict(zip(ids, prepare, strict=False)) if pooled else {}
        return FeatureMetric(ids, feature_id, digest, features, distances, pools)

    return open_it


class DinoFeatures:
    """Class token of DINOv2 after its last norm (Stein et al. 2023 take ViT-L/14)."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load a transformers folder.

        Args:
            folder: with config.json and safetensors.
            device: where the network runs.
        """
        from transformers import Dinov2Model

        network: Any = Dinov2Model.from_pretrained(folder, local_files_only=True)
        self._network = network.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def __call__(self, rgb: ImageArray) -> Features:
        """(1, d)."""
        # Antialiased like `clean`: at 4096 px plain taps would read 4 of 334 pixels.
        small = (clean_resize(rgb, DINO_INPUT_PX) / 255.0 - _IMAGENET_MEAN) / _IMAGENET_STD
        pixels = torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)[None]))
        output = self._network(pixel_values=pixels.to(self._device, torch.float32))
        # Token 0 is the class token, after the last norm.
        rows: Features = output.last_hidden_state[:, 0].float().cpu().numpy()
        return rows


def dino_metric(folder: Path, digest: str, device: str) -> FeatureMetric:
    """FD-DINOv2 on a local folder."""
    features = DinoFeatures(folder, device)
    distances, pools = frechet_only("fd_dinov2"), {"fd_dinov2": GramFrechet}
    return FeatureMetric(
        ("fd_dinov2",), "dinov2-cls/clean-224/v1", digest, features, distances, pools
    )
