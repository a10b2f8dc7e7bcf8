"""Exponential moving average of the weights, kept in float32.

The average takes (name, tensor) pairs, not a module: today every process feeds it all float32
master weights; with sharded averages each process would feed its own part through the same calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """avg <- decay * avg + (1 - decay) * weights, with a warm-up of the decay.

    In the first steps the decay is min(decay, (1 + n) / (10 + n)) after n updates (as in
    Karras' and diffusers' averages), so that short runs do not average in the starting point.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]], decay: float) -> None:
        """Start from a copy of `weights`.

        Args:
            weights: (name, tensor) pairs of any floating dtype.
            decay: in [0, 1).
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay {decay} must be in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.weights = {name: tensor.detach().float().clone() for name, tensor in weights}

    def current_decay(self) -> float:
        """Decay that the next `update` applies."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards `weights` (same names and shapes as at construction)."""
        blend = 1.0 - self.current_decay()
        for name, tensor in weights:
            self.weights[name].lerp_(tensor.detach().float(), blend)
        self.updates += 1

    def restore(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Take over a stored average.

        Raises:
            ValueError: names or shapes differ from this model's.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if expected != found:
            different = sorted(set(expected.items()) ^ set(found.items()))[:4]
            raise ValueError(f"stored average does not fit the model; it differs in {different}")
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)
        self.updates = updates

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Let `module` hold the average (cast to its dtype) inside the block, bit-exact undo.

        Values are copied in place because DeepSpeed keeps views of the parameters' storage.
        """
        parameters = dict(module.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.weights}
        try:
            self._copy_into(parameters, self.weights)
            yield
        finally:
            self._copy_into(parameters, kept)

    @staticmethod
    @torch.no_grad()
    def _copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)
