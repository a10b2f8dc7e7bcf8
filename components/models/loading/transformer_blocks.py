"""The blocks of a diffusers transformer, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def transformer_blocks(model: Any) -> Iterator[Any]:
    """Its blocks in the order in which they compute; Flux has two kinds, others one.

    Args:
        model: bare model.
    """
    for name in ("transformer_blocks", "single_transformer_blocks"):
        yield from getattr(model, name, ())
