"""torch.compile of the transformer's repeated blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

_BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")


def compile_blocks(model: Any) -> None:
    """Compile each kind of block once for all image sizes.

    Blocks are compiled in place, so parameter names stay as they are. Sequence lengths are
    symbols in the graphs (`dynamic=True`): with fixed ones every bucket would compile anew until
    torch gives up at its limit of 8.

    Args:
        model: a diffusers transformer whose blocks are in `transformer_blocks` and, where it has
            them, `single_transformer_blocks`.
    """
    if not getattr(model, "_repeated_blocks", None):
        # SD3's class does not say which of its modules repeat.
        blocks: list[nn.Module] = [b for name in _BLOCK_LISTS for b in getattr(model, name, [])]
        model._repeated_blocks = sorted({type(block).__name__ for block in blocks})
    model.compile_repeated_blocks(dynamic=True)
