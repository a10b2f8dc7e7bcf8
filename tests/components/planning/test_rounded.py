"""Bytes of rounded weights by formula, and as the libraries hold them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from components.models.loading.quantisation import quantise, stored_bytes
from components.planning.rounded import layer_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "library"), [("int8", "torchao"), ("fp8", "torchao"), ("nf4", "bitsandbytes")]
)
def test_a_rounded_matrix_takes_what_its_library_holds(kind, library, dtype):
    pytest.importorskip(library)
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Sequential(nn.Linear(96, 160, bias=False, dtype=dtype))])
    assert stored_bytes(network) == layer_bytes("none", 96, 160, dtype.itemsize)
    quantise(network, kind, dtype=dtype, device="cpu")
    assert stored_bytes(network) == layer_bytes(kind, 96, 160, dtype.itemsize)
