"""2x2 blocks of latents as tokens, in the order that FluxPipeline packs them."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def pack_latents(latents_BChw: Tensor) -> Tensor:
    """(B, C, h, w) to tokens (B, h/2 * w/2, 4 C), row by row, channels outermost in a token."""
    # The order is part of the weights' meaning: the embedder's columns belong to (c, p, q) in this
    # order.
    return rearrange(latents_BChw, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack_latents(tokens_BNC: Tensor, tokens_h: int, tokens_w: int) -> Tensor:
    """Inverse of `pack_latents`: (B, N, 4 C) to (B, C, 2 tokens_h, 2 tokens_w)."""
    return rearrange(
        tokens_BNC, "b (h w) (c p q) -> b c (h p) (w q)", h=tokens_h, w=tokens_w, p=2, q=2
    )
