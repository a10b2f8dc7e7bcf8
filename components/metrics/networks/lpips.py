"""LPIPS (Zhang et al. 2018, v0.1) of images of any size, exact in tiles.

The network is torchvision's AlexNet or VGG16 cut at five ReLUs; at each, channels are normalised
per position, squared differences are weighted by the published heads and averaged over positions.
An average is a sum over positions, so it can be taken tile by tile: a tile is read with a halo that
covers the receptive field, starts at a multiple of the network's stride, and counts only the
positions that it owns. Zero padding inside the network then happens where the whole image has it
and nowhere else. The result is that of the whole image up to float32 rounding of the convolutions
(tested), in memory that does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from components.images.arrays import ImageArray

if TYPE_CHECKING:
    from components.metrics.metric import Picture

Backbone = Literal["alex", "vgg"]

# ImageNet statistics on the [-1, 1] scale, as the released code has them.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_NORM_EPSILON = 1e-10
MAX_STRIDE_PX = 16
MIN_EDGE_PX = 64
"""Below this AlexNet's last map has a few positions only; the released code has no limit."""


@dataclass(frozen=True)
class _Layout:
    """Where torchvision's `features` is cut."""

    cuts: tuple[int, ...]
    strides_px: tuple[int, ...]
    halo_px: int
    """Multiple of the stride, at least the receptive field's half plus what pooling adds."""


LAYOUTS: dict[Backbone, _Layout] = {
    # Reach of the last position: 7 + 2*8 + pools 8 + 16, + 3 * 16 = 95 px.
    "alex": _Layout((2, 5, 8, 10, 12), (4, 8, 16, 16, 16), 112),
    # 2 + 2*2 + 3*4 + 3*8 + 3*16 and the four pools, 1 + 2 + 4 + 8: 105 px.
    "vgg": _Layout((4, 9, 16, 23, 30), (1, 2, 4, 8, 16), 112),
}


# Width, kernel, stride and padding of a convolution (with its ReLU), or a pool's kernel (stride 2).
_LAYERS: dict[Backbone, tuple[tuple[int, int, int, int] | int, ...]] = {
    "alex": ((64, 11, 4, 2), 3, (192, 5, 1, 2), 3, *((w, 3, 1, 1) for w in (384, 256, 256))),
    "vgg": (
        *[(64, 3, 1, 1)] * 2,
        2,
        *[(128, 3, 1, 1)] * 2,
        2,
        *[(256, 3, 1, 1)] * 3,
        2,
        *[(512, 3, 1, 1)] * 3,
        2,
        *[(512, 3, 1, 1)] * 3,
    ),
}


def _features(backbone: Backbone) -> list[nn.Module]:
    """The convolutional part, numbered as torchvision's `features`, up to the last cut.

    Not torchvision's constructor, which spends seconds on the classifier's random weights.
    """
    layers: list[nn.Module] = []
    channels = 3
    for layer in _LAYERS[backbone]:
        if isinstance(layer, int):
            layers.append(nn.MaxPool2d(layer, 2))
        else:
            width, kernel, stride, padding = layer
            layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
            channels = width
    return layers


class Lpips(nn.Module):
    """The distance, with random weights until they are loaded.

    Args:
        backbone: "alex" or "vgg".
        tile_px: core edge of a tile, a multiple of 16.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone, tile_px: int = 512) -> None:
        super().__init__()
        if tile_px < MAX_STRIDE_PX or tile_px % MAX_STRIDE_PX:
            raise ValueError(f"tile_px {tile_px} must be a positive multiple of {MAX_STRIDE_PX}")
        layout = LAYOUTS[backbone]
        features = _features(backbone)
        # Each stage goes on from the one before, so all five maps cost one pass.
        bounds = (0, *layout.cuts)
        self.stages = nn.ModuleList(
            nn.Sequential(*features[start:stop]) for start, stop in pairwise(bounds)
        )
        # The last convolution before a cut says how many channels its map has.
        widths = [
            next(m.out_channels for m in reversed(list(stage)) if isinstance(m, nn.Conv2d))
            for stage in self.stages
            if isinstance(stage, nn.Sequential)
        ]
        self.heads = nn.ParameterList(torch.rand(width) for width in widths)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.layout, self.tile_px = layout, tile_px
        self.requires_grad_(False).eval()

    def load(self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        """Take the weights of torchvision's file and of the lpips package's file.

        Args:
            backbone: torchvision state dict, `features.{i}.weight` and `.bias`.
            heads: `lin{k}.model.1.weight`, (1, C, 1, 1).

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        index = 0
        with torch.no_grad():
            for stage in self.stages:
                assert isinstance(stage, nn.Sequential)
                for layer in stage:
                    if isinstance(layer, nn.Conv2d):
                        _copy(layer.weight, backbone, f"features.{index}.weight")
                        assert layer.bias is not None
                        _copy(layer.bias, backbone, f"features.{index}.bias")
                    # Counts layers without weights too, as torchvision numbers them.
                    index += 1
            for number, head in enumerate(self.heads):
                _copy(head, heads, f"lin{number}.model.1.weight")

    def _map_edges(self, size_px: int) -> list[int]:
        """Length of every cut's feature map for an edge of the whole image."""
        edges = []
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for layer in stage:
                if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                    kernel, stride, padding = (
                        v[0] if isinstance(v, tuple) else v
                        for v in (layer.kernel_size, layer.stride, layer.padding)
                    )
                    # The layers' own formula with its floor: the number of positions divides the
                    # sum, and for AlexNet it is no quotient of size and stride.
                    size_px = (size_px + 2 * int(padding) - int(kernel)) // int(stride) + 1
            edges.append(size_px)
        return edges

    def _spans(self, size_px: int) -> Iterator[tuple[slice, list[slice]]]:
        """Tiles along one axis: pixels to read, and the positions owned at every cut."""
        maps = self._map_edges(size_px)
        starts = range(0, max(size_px, 1), self.tile_px)
        for start in starts:
            stop = start + self.tile_px
            is_last = stop >= size_px
            # Start and halo are multiples of the largest stride, so a tile's positions are the
            # whole image's; whatever zero padding spoils at its inner edges lies in the halo.
            first = max(0, start - self.layout.halo_px)
            pixels = slice(first, min(size_px, stop + self.layout.halo_px))
            owned = []
            for stride, length in zip(self.layout.strides_px, maps, strict=True):
                # Maps are not exactly size / stride; the last tile owns what is left over.
                end = length if is_last else min(length, stop // stride)
                owned.append(
                    slice(min(start // stride, end) - first // stride, end - first // stride)
                )
            yield pixels, owned

    def _scaled(self, rgb: ImageArray) -> Tensor:
        device = self.heads[0].device
        image = torch.from_numpy(np.array(rgb, copy=True)).to(device).permute(2, 0, 1)[None]
        scaled: Tensor = (image.float() / 127.5 - 1.0 - self.shift) / self.scale
        return scaled

    @torch.no_grad()
    def forward(self, reference: ImageArray, image: ImageArray) -> float:
        """The distance of two images; 0 for equal ones.

        Args:
            reference: uint8 (H, W, 3), edges of at least 64 px.
            image: uint8 (H, W, 3).

        Raises:
            ValueError: shapes differ or an edge is too short.
        """
        if reference.shape != image.shape:
            raise ValueError(f"shapes differ: {reference.shape} and {image.shape}")
        height, width = image.shape[:2]
        if min(height, width) < MIN_EDGE_PX:
            raise ValueError(f"LPIPS needs edges of at least {MIN_EDGE_PX} px, got {height, width}")
        # Sums and counts, divided once at the end: a mean of tiles' means would weigh partial tiles
        # like full ones.
        sums = np.zeros(len(self.stages))
        for rows, own_rows in self._spans(height):
            for columns, own_columns in self._spans(width):
                a, b = self._scaled(reference[rows, columns]), self._scaled(image[rows, columns])
                for cut, stage in enumerate(self.stages):
                    a, b = stage(a), stage(b)
                    # Cut here only: the next stage needs the halo.
                    window = (..., own_rows[cut], own_columns[cut])
                    sums[cut] += self._weighted_sum(a[window], b[window], self.heads[cut])
        counts = np.multiply(self._map_edges(height), self._map_edges(width))
        return float((sums / counts).sum())

    @staticmethod
    def _weighted_sum(a: Tensor, b: Tensor, head: Tensor) -> float:
        """Sum over positions of w . (a / |a| - b / |b|)^2, accumulated in float64."""
        # The last tile may own no position of a coarse map.
        if a.numel() == 0:
            return 0.0
        # The epsilon stands beside the norm, not under the root, as released.
        a = a / (a.square().sum(1, keepdim=True).sqrt() + _NORM_EPSILON)
        b = b / (b.square().sum(1, keepdim=True).sqrt() + _NORM_EPSILON)
        # The released 1x1 convolution, which has no bias.
        weighted = torch.einsum("bchw,c->bhw", (a - b).square(), head)
        # VGG's first map of a 4096 px picture has 16.8 million positions: float32 would lose the
        # small ones.
        return float(weighted.sum(dtype=torch.float64))


def _copy(target: Tensor, state: Mapping[str, Tensor], key: str) -> None:
    if key not in state:
        raise ValueError(f"no tensor {key} in the file")
    source = state[key]
    # By number of values: the heads' file keeps them as (1, C, 1, 1).
    if source.numel() != target.numel():
        raise ValueError(f"{key} is {tuple(source.shape)}, expected {tuple(target.shape)}")
    target.copy_(source.reshape(target.shape))


class LpipsMetric:
    """`metrics.ImageMetric` over verified local weights."""

    def __init__(
        self,
        metric_id: str,
        backbone: Backbone,
        files: tuple[Path, Path],
        digest: str,
        device: str,
    ) -> None:
        """Load.

        Args:
            metric_id: id of the card.
            backbone: "alex" or "vgg".
            files: torchvision's file and the heads.
            digest: of both files.
            device: where the network runs.
        """
        self.ids = (metric_id,)
        self.weights_digest = digest
        # `weights_only`: the files are pickles from elsewhere.
        states: list[dict[str, Any]] = [
            torch.load(file, map_location="cpu", weights_only=True) for file in files
        ]
        self._network = Lpips(backbone)
        self._network.load(*states)
        self._network.to(device)

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`; None below 64 px."""
        from components.metrics.metric import reference_rgb

        if min(rgb.shape[:2]) < MIN_EDGE_PX:
            return {self.ids[0]: None}
        return {self.ids[0]: self._network(reference_rgb(picture), rgb)}
