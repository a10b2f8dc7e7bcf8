"""8-bit pixels to the value range that the autoencoder works in, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from components.images.arrays import ImageArray


def to_model(images: Sequence[ImageArray]) -> Tensor:
    """Images of one size to (B, 3, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def to_pixels(images_BCHW: Tensor) -> list[ImageArray]:
    """(B, 3, H, W) in [-1, 1] to clipped and rounded uint8 images (H, W, 3)."""
    scaled = ((images_BCHW.detach().float().cpu() + 1.0) * 127.5).clamp(0.0, 255.0).round()
    return list(scaled.permute(0, 2, 3, 1).contiguous().to(torch.uint8).numpy())
