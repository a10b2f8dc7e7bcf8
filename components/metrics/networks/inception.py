"""InceptionV3 as the Fréchet Inception distance uses it, and the two ways to shrink an image to it.

The network that FID is defined by (TensorFlow's inception-2015-12-05) differs from torchvision's in
1008 classes, in average pools that do not count padding, and in a maximum pool where the last block
has an average pool. Parameter names are torchvision's, so pt_inception-2015-12-05-6726825d.pth
(the port of the pytorch-fid project) loads as it is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import Inception3
from torchvision.models.inception import InceptionA, InceptionC, InceptionE

from components.images.arrays import ImageArray

INPUT_PX = 299
FEATURES = 2048
_CLASSES = 1008
_TRUNK = (
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "maxpool1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "maxpool2",
    *(f"Mixed_5{block}" for block in "bcd"),
    *(f"Mixed_6{block}" for block in "abcde"),
    *(f"Mixed_7{block}" for block in "abc"),
)


# TensorFlow's average pool leaves padding out of the count; torchvision's blocks count it, which
# moves every feature. So their forward passes are written again here.
def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class _BlockA(InceptionA):
    def forward(self, x: Tensor) -> Tensor:
        fives = self.branch5x5_2(self.branch5x5_1(x))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_average(x))], 1)


class _BlockC(InceptionC):
    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for number in range(1, 6):
            double = getattr(self, f"branch7x7dbl_{number}")(double)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class _BlockE(InceptionE):
    def __init__(self, channels: int, *, maximum: bool) -> None:
        super().__init__(channels)
        # The known oddity of the FID graph: its last block pools the maximum.
        self.maximum = maximum

    def forward(self, x: Tensor) -> Tensor:
        short = self.branch3x3_1(x)
        long = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        # In this order: the channels of the 2048 features depend on it.
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(short),
            self.branch3x3_2b(short),
            self.branch3x3dbl_3a(long),
            self.branch3x3dbl_3b(long),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


class FidInception(nn.Module):
    """The network up to its last average: (B, 3, 299, 299) in [-1, 1] to (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        # 1008 classes and no auxiliary head: the file's names then fit without a translation.
        # Random weights would be replaced, so none are drawn.
        net = Inception3(num_classes=_CLASSES, aux_logits=False, init_weights=False)
        net.Mixed_5b = _BlockA(192, 32)
        net.Mixed_5c = _BlockA(256, 64)
        net.Mixed_5d = _BlockA(288, 64)
        for block, width in zip("bcde", (128, 160, 160, 192), strict=True):
            setattr(net, f"Mixed_6{block}", _BlockC(768, width))
        net.Mixed_7b = _BlockE(1280, maximum=False)
        net.Mixed_7c = _BlockE(2048, maximum=True)
        self.net = net
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Features of the last mixed block, averaged over positions.

        Args:
            x: (B, 3, H, W) float32 in [-1, 1], normally 299 x 299.

        Returns:
            (B, 2048).
        """
        # Module by module, since Inception3's own forward goes on to logits.
        for name in _TRUNK:
            x = getattr(self.net, name)(x)
        return x.mean((2, 3))


def normalised(pixels_HWC: npt.NDArray[np.float32]) -> Tensor:
    """(H, W, 3) in 0..255 to (1, 3, H, W): (x - 128) / 128, as the FID network was trained."""
    values = torch.from_numpy(np.ascontiguousarray(pixels_HWC, dtype=np.float32))
    # 128 and not 127.5: white is 0.992, as in the original graph.
    return ((values - 128.0) / 128.0).permute(2, 0, 1)[None]


def _taps(length: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], ImageWeights]:
    """TensorFlow 1's bilinear taps: position i reads i * length / 299, not a pixel's centre."""
    # float32 as TensorFlow has it: in float64 a tap could fall on another pixel.
    scale = np.float32(length) / np.float32(INPUT_PX)
    position = np.arange(INPUT_PX, dtype=np.float32) * scale
    low = np.floor(position).astype(np.intp)
    return low, np.minimum(low + 1, length - 1), position - low.astype(np.float32)


ImageWeights = npt.NDArray[np.float32]


def bilinear_without_antialias(rgb: ImageArray) -> npt.NDArray[np.float32]:
    """Shrink to 299 x 299 as torch-fidelity and torchmetrics before 1.8 do.

    At 4096 px each output pixel reads 4 of 188 input pixels: the aliasing is part of the protocol.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        float32 (299, 299, 3) in 0..255.
    """
    top, bottom, down = _taps(rgb.shape[0])
    left, right, across = _taps(rgb.shape[1])
    across = across[None, :, None]

    # Four reads per output pixel: a 4096 px picture never becomes floats as a whole.
    def row(rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        near = rgb[np.ix_(rows, left)].astype(np.float32)
        far = rgb[np.ix_(rows, right)].astype(np.float32)
        mixed: npt.NDArray[np.float32] = near + (far - near) * across
        return mixed

    upper, lower = row(top), row(bottom)
    result: npt.NDArray[np.float32] = upper + (lower - upper) * down[:, None, None]
    return result


def clean_resize(rgb: ImageArray, size_px: int = INPUT_PX) -> npt.NDArray[np.float32]:
    """Shrink as clean-fid does (Parmar et al. 2022): PIL's bicubic filter on float channels.

    PIL's filters widen with the scale, so nothing aliases; floats are not rounded, only clipped.

    Args:
        rgb: uint8 (H, W, 3).
        size_px: edge of the result; the aspect ratio is not kept.

    Returns:
        float32 (size_px, size_px, 3) in 0..255.
    """
    channels = [
        np.asarray(
            Image.fromarray(rgb[..., c].astype(np.float32)).resize(
                (size_px, size_px), Image.Resampling.BICUBIC
            )
        )
        for c in range(3)
    ]
    return np.clip(np.stack(channels, axis=-1), 0.0, 255.0)


def grid_patches(rgb: ImageArray) -> list[ImageArray]:
    """All full 299 px patches of a centred grid without overlap; native pixels.

    Args:
        rgb: uint8 (H, W, 3); 4096 x 4096 gives 13 x 13 patches and a margin of 104 px.
    """
    counts = [edge // INPUT_PX for edge in rgb.shape[:2]]
    # Centred, so that what is left out is the same on both sides.
    offsets = [(edge - n * INPUT_PX) // 2 for edge, n in zip(rgb.shape[:2], counts, strict=True)]
    return [
        rgb[y : y + INPUT_PX, x : x + INPUT_PX]
        for y in range(offsets[0], offsets[0] + counts[0] * INPUT_PX, INPUT_PX)
        for x in range(offsets[1], offsets[1] + counts[1] * INPUT_PX, INPUT_PX)
    ]
