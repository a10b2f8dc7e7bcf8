"""Tensors as raw records: no framing, so that a record is read by its position alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

StoreDtype = Literal["float32", "bfloat16"]


def to_record(tensor: Tensor, dtype: StoreDtype) -> bytes:
    """Bytes of a tensor of any shape, row-major, little-endian."""
    stored = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
    # NumPy has no bfloat16, so its bits travel as 16-bit integers.
    bits = (stored.view(torch.int16) if dtype == "bfloat16" else stored).numpy()
    # Said explicitly, so that the files mean the same on every machine; a copy only on big-endian
    # ones.
    return bits.astype(bits.dtype.newbyteorder("<"), copy=False).tobytes()
