"""What the block benchmark varies: attention kernels, repetition in backward, float8 linears."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from flux_blocks import Attend
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)


class NotMeasured(RuntimeError):
    """What this machine lacks for a row."""


def sdpa(backend: SDPBackend | None) -> Attend:
    """Attention of torch through one kernel; None: its own choice."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def flash3() -> Attend:
    """FlashAttention 3 where its package is installed."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        raise NotMeasured("no flash_attn_interface (FA3)") from None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(*(part.transpose(1, 2) for part in (q, k, v)))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attend


def plain(block: nn.Module, *arguments: Any) -> Tensor:
    """A block as it is."""
    return block(*arguments)


def whole_blocks(block: nn.Module, *arguments: Any) -> Tensor:
    """A block whose inside is repeated in the backward pass."""
    return checkpoint(block, *arguments, use_reentrant=False)


def _keep_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operator)
    kept = any(part in name for part in ("mm", "attention", "flash"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(block: nn.Module, *arguments: Any) -> Tensor:
    """Products and attention are kept, everything else in the block is repeated."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)


class Float8Linear(nn.Module):
    """Approximate: float8 (e4m3) weight and input, one scale each, through `_scaled_mm`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        top = torch.finfo(torch.float8_e4m3fn).max
        self.scale = linear.weight.detach().abs().max().float() / top
        weight = (linear.weight.detach().float() / self.scale).to(torch.float8_e4m3fn)
        self.weight, self.bias = weight.t(), linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        flat = x.flatten(0, -2)
        scale = flat.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
        low = (flat.float() / scale).to(torch.float8_e4m3fn)
        result = torch._scaled_mm(
            low, self.weight, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=x.dtype
        )
        return result.unflatten(0, x.shape[:-1])


def to_float8(module: nn.Module) -> None:
    """Replace the linear layers that work on tokens; modulation (one row) stays."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and name != "linear":
            setattr(module, name, Float8Linear(child))
        else:
            to_float8(child)
