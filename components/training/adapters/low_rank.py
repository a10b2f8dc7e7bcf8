"""Changes of weight matrices in low rank: adding them up exactly, and cutting their rank.

A change of a matrix W (out, in) is up @ down, up (out, r), down (r, in): no further scale. The sum
of two changes of ranks r and s is exact at rank r + s: the factors stand beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """up @ down."""

    down: Tensor
    """(r, in)."""
    up: Tensor
    """(out, r)."""

    @property
    def rank(self) -> int:
        """Number of columns of `up`."""
        return int(self.down.shape[0])

    def matrix(self) -> Tensor:
        """The change itself, (out, in) float64."""
        return self.up.double() @ self.down.double()


Change = Mapping[str, LowRank]
"""By name of the layer, such as transformer_blocks.0.attn.to_q."""


def added(first: Change, second: Change) -> dict[str, LowRank]:
    """The sum of two changes, exact at the sum of their ranks.

    Raises:
        ValueError: they change a layer of another shape.
    """
    total = dict(first)
    for name, change in second.items():
        before = total.get(name)
        if before is None:
            total[name] = change
            continue
        sizes = [(one.up.shape[0], one.down.shape[1]) for one in (before, change)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"adapter: layer {name} is {sizes[0]} in one and {sizes[1]} in the other"
            )
        total[name] = LowRank(
            torch.cat([before.down, change.down.to(before.down)], 0),
            torch.cat([before.up, change.up.to(before.up)], 1),
        )
    return total


def reduced(change: Change, rank: int) -> tuple[dict[str, LowRank], float]:
    """Each layer's best change of at most `rank` (Eckart and Young), and what it misses.

    Computed in float64 from the factors: QR of both, and the singular values of the small product.

    Args:
        change: float32 factors.
        rank: at least 1.

    Returns:
        (change, missing): missing is ||change - reduced|| / ||change|| over all layers (Frobenius),
        0 where nothing was cut.
    """
    kept: dict[str, LowRank] = {}
    lost = total = 0.0
    for name, one in change.items():
        q_up, r_up = torch.linalg.qr(one.up.double())
        q_down, r_down = torch.linalg.qr(one.down.double().T)
        left, values, right = torch.linalg.svd(r_up @ r_down.T)
        total += float(values.square().sum())
        if one.rank <= rank:
            kept[name] = one
            continue
        lost += float(values[rank:].square().sum())
        # Shared between both factors, so that neither is out of a small type's range.
        root = values[:rank].sqrt()
        up = q_up @ left[:, :rank] * root
        down = root[:, None] * (right[:rank] @ q_down.T)
        kept[name] = LowRank(down.to(one.down).contiguous(), up.to(one.up).contiguous())
    return kept, math.sqrt(lost / total) if lost else 0.0
