"""Exponential moving average of the weights, in float32, divided over the ranks.

Every rank averages its own share of the weights (`sharded.weight_shards`), so the
average costs 4 bytes times parameters divided by ranks. Averaging is element by element: the
divided average has the same bits as an undivided one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from components.training.distributed.checkpoints import reading
from components.training.distributed.ranks import Ranks
from components.training.sharded.host_copies import HostCopies
from components.training.sharded.weight_shards import (
    WeightShard,
    assemble,
    model_values,
    release_gathered,
    write_model_values,
)

SHARDS_KEY = "shards"
FILES = "ema-*.safetensors"


class WeightAverage:
    """avg <- decay * avg + (1 - decay) * weights, with a warm-up of the decay.

    In the first steps the decay is min(decay, (1 + n) / (10 + n)) after n updates (as in
    Karras' and diffusers' averages), so that short runs do not average in the starting point.
    """

    def __init__(
        self,
        shards: Iterable[WeightShard],
        decay: float,
        ranks: Ranks,
        device: torch.device | None = None,
    ) -> None:
        """Start from a copy of `shards`.

        Args:
            shards: this rank's share of every averaged parameter.
            decay: in [0, 1).
            ranks: this process.
            device: where the average is kept; None: where the shards are.
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay {decay} must be in [0, 1)")
        self.decay = decay
        self.updates = 0
        self._ranks = ranks
        self.shards = {
            shard.name: WeightShard(
                shard.name,
                shard.shape,
                shard.start,
                # `to` alone would return the masters themselves where nothing is to convert.
                shard.values.detach().to(device, torch.float32, copy=True),
            )
            for shard in shards
        }

    def current_decay(self) -> float:
        """Decay that the next `update` applies."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, shards: Iterable[WeightShard]) -> None:
        """Move towards `shards` (same names and elements as at construction)."""
        # Read before `updates` moves: the first update uses n = 0.
        blend = 1.0 - self.current_decay()
        for shard in shards:
            average = self.shards[shard.name].values
            # Where the average lives on the host, the weights travel to it and not the other way.
            average.lerp_(shard.values.to(average.device, torch.float32), blend)
        self.updates += 1

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 average) of every parameter, one at a time; collective."""
        for name, shard in self.shards.items():
            # One at a time, because the whole average in float32 need not fit on a device.
            yield name, assemble(shard, self._ranks)

    def take_write(self, folder: Path, copies: HostCopies) -> Callable[[], None]:
        """Copy this rank's share now; the returned function writes it into `folder` later.

        On CUDA a fence of `copies` must be waited for before that.
        """
        # A rank has no part of most parameters; empty parts are not written.
        held = {name: shard for name, shard in self.shards.items() if shard.values.numel()}
        # In the file itself, so that any other number of ranks can put the parts together.
        layout = {name: [shard.start, *shard.shape] for name, shard in held.items()}
        # A name that none of the engine's files has, so that neither takes the other's memory.
        values = copies.take(FILES, {name: shard.values for name, shard in held.items()})
        return partial(
            save_file,
            values,
            folder / FILES.replace("*", f"rank{self._ranks.rank:05d}"),
            metadata={SHARDS_KEY: json.dumps(layout)},
        )

    def load(self, folder: Path, updates: int) -> None:
        """Take over this rank's share of an average that any number of ranks saved.

        Raises:
            ValueError: names or shapes differ from this model's, or parts are missing.
        """
        stored = _StoredAverage(sorted(folder.glob(FILES)))
        expected = {name: shard.shape for name, shard in self.shards.items()}
        if expected != stored.shapes:
            # A few names are enough to recognise another network.
            different = sorted(set(expected.items()) ^ set(stored.shapes.items()))[:4]
            raise ValueError(f"stored average does not fit the model; it differs in {different}")
        for name, shard in self.shards.items():
            # In place, so the average stays on the device where it was put.
            shard.values.copy_(stored.read(name, shard.start, shard.values.numel()))
        self.updates = updates

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Let `module` compute with the average (in its dtype) inside the block; collective.

        The undo is bit-exact. What is set aside meanwhile is this rank's share only.
        """
        parameters = dict(module.named_parameters())
        # Averaged parameters only: frozen weights are the same in both and are not touched.
        kept = {n: model_values(parameters[n], shard) for n, shard in self.shards.items()}
        try:
            self._write(module, parameters, self.shards)
            yield
        finally:
            # After an error too: whatever is saved next must be the trained weights.
            self._write(module, parameters, kept)

    def _write(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        shards: dict[str, WeightShard],
    ) -> None:
        # ZeRO 3 may still hold whole parameters with the values from before.
        release_gathered(module)
        for name, shard in shards.items():
            write_model_values(parameters[name], shard, self._ranks)


class _StoredAverage:
    """The files of all ranks that saved an average."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        # Opened, not read: `read` takes the elements of this rank from each file.
        for path in files:
            with reading(path):
                file = safe_open(path, framework="pt")
                for name, (start, *shape) in json.loads(file.metadata()[SHARDS_KEY]).items():
                    self.shapes[name] = tuple(shape)
                    self._parts.setdefault(name, []).append((start, file.get_slice(name)))

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count` of a flattened parameter, (count,) float32."""
        result = torch.empty(count)
        found = 0
        for part_start, part in self._parts[name]:
            low = max(start, part_start)
            high = min(start + count, part_start + part.get_shape()[0])
            if low < high:
                result[low - start : high - start] = part[low - part_start : high - part_start]
                found += high - low
        # Overlaps are impossible (`master_shards`), so the count alone tells that something is
        # missing.
        if found != count:
            raise ValueError(
                f"stored average: {count - found} of {count} elements of {name} "
                f"(of {math.prod(self.shapes[name])}) are in no file; a rank's file is missing"
            )
        return result
