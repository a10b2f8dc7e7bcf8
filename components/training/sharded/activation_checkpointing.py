"""Which activations a backward pass finds stored, and which it computes again.

`blocks` stores what enters a transformer block; the backward pass runs the block's forward again.
`selective` also stores what matrix products and attention give, which is nearly all the arithmetic
of a block, so that only cheap elementwise work (norms, modulation, activations) is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from components.settings.training import Checkpointing

# Attention is one operator per kernel library; names that a build lacks are left out.
_ATTENTION = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
_PRODUCTS = ("addmm", "baddbmm", "bmm", "mm")
STORED_OPERATORS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (*_PRODUCTS, *_ATTENTION)
    if hasattr(torch.ops.aten, name)
)


def enable_activation_checkpointing(
    model: Any, policy: Checkpointing, *, to_host: bool = False
) -> None:
    """Apply `policy` to every block of a diffusers transformer; gradients stay the same.

    Args:
        model: any diffusers model that supports gradient checkpointing.
        policy: what is stored between forward and backward.
        to_host: what enters a block waits in host memory (pinned on CUDA); with `none` nothing is
            stored by itself that could.
    """
    if policy == "none":
        model.disable_gradient_checkpointing()
    else:
        chosen = _CHECKPOINTS[policy]
        model.enable_gradient_checkpointing(partial(_on_host, chosen) if to_host else chosen)


def _on_host(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Outside of the checkpoint: its own hooks catch what the block saves, these what enters it.
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return call(*args, **kwargs)


def _store(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operator in STORED_OPERATORS:
        return CheckpointPolicy.MUST_SAVE
    # Cheap to compute and large to keep: memory is what checkpointing is for.
    return CheckpointPolicy.PREFER_RECOMPUTE


# The blocks have no dropout, so the state of the random generators need not be kept.
# Not the re-entrant form: it needs an input that requires a gradient, which the first block of a
# frozen base does not get, and it takes no policy.
_CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "blocks": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _store),
    ),
}
