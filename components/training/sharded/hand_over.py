"""How much of what training learned survives a hand-over: export, load, merge, resume.

Training at a learning rate of 1e-6 moves a weight by less than bfloat16 can hold, so a place that
rounds on the way (a cast, a quantisation, masters made of rounded copies) gives back most of what
was learned, and no loss shows it. Each hand-over is therefore measured against the movement:

    kept = 1 - ||handed over - learned|| / ||learned - start||

over all trained weights: 1 is exact, 0 as good as never trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from components.files.whole_files import write_text
from components.training.distributed.checkpoints import reading
from components.training.distributed.ranks import Ranks
from components.training.sharded.host_copies import HostCopies
from components.training.sharded.weight_shards import WeightShard

MOVEMENT_FILE = "movement.json"
"""Beside exported weights: squared movement of each trained weight, from where its stage began."""
HAND_OVERS_FILE = "hand_overs.jsonl"
"""In a state's folder: every hand-over that was measured, oldest first."""
SAMPLE_FILES = "masters-*.safetensors"
# Of each weight; 12B parameters in a thousand tensors make 64,000 numbers a checkpoint.
_SAMPLES = 64

Where = Literal["export", "load", "merge", "quantisation", "resume"]


class LearningLost(ValueError):
    """A hand-over kept less of what was learned than the settings ask for."""


@dataclass(frozen=True)
class HandOver:
    """One hand-over of trained weights, measured."""

    where: Where
    moved: float
    """Euclidean length of what training moved the weights by."""
    error: float
    """Euclidean length of what came out differently."""

    @property
    def kept(self) -> float:
        """Share of the movement that arrived, 0 to 1."""
        if self.error == 0.0:
            return 1.0
        # NaN and an error without any movement count as a loss of all.
        share = 1.0 - self.error / self.moved if self.moved > 0.0 else 0.0
        return max(0.0, share) if math.isfinite(share) else 0.0

    def check(self, minimum: float, name: str) -> None:
        """Nothing, where enough was kept.

        Args:
            minimum: share.
            name: of the stage, for the message.

        Raises:
            LearningLost: less than `minimum` was kept.
        """
        if self.kept < minimum:
            raise LearningLost(
                f"{name}: {self.where} keeps {self.kept:.1%} of what training moved the weights by "
                f"(at least {minimum:.1%}: {name}.min_kept_movement); something on the way rounds "
                "them, such as weights stored or loaded in bfloat16"
            )


def compared(
    where: Where,
    learned: Iterable[tuple[str, Tensor]],
    handed_over: Callable[[str], Tensor],
    moved_squares: Mapping[str, float],
) -> HandOver:
    """Measure a hand-over tensor by tensor; also for a quantised copy, dequantised.

    Args:
        where: it happens.
        learned: (name, weight) of what was learned.
        handed_over: gives the weight of a name as it arrived, of the same shape.
        moved_squares: squared movement by name (`movement`).
    """
    error = moved = 0.0
    for name, weights in learned:
        error += squared_distance(handed_over(name), weights)
        moved += moved_squares[name]
    return HandOver(where, moved**0.5, error**0.5)


def squared_distance(one: Tensor, other: Tensor) -> float:
    """Sum of squared differences, in float64 on the CPU."""
    return float((one.detach().cpu().double() - other.detach().cpu().double()).square().sum())


def movement(learned: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, float]:
    """Squared movement of each weight."""
    return {name: squared_distance(weights, start[name]) for name, weights in learned.items()}


def write_movement(folder: Path, moved_squares: Mapping[str, float]) -> None:
    """Leave it beside exported weights, for whoever loads them."""
    text = json.dumps({"format": 1, "squares": dict(moved_squares)}, indent=1, sort_keys=True)
    write_text(folder / MOVEMENT_FILE, text + "\n")


def read_movement(folder: Path) -> dict[str, float] | None:
    """What `write_movement` left; None: the folder is no stage's export, such as a release."""
    try:
        text = (folder / MOVEMENT_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    squares: dict[str, float] = json.loads(text)["squares"]
    return squares


class StoredWeights:
    """Tensors of the safetensors files in a folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Open the files of `folder`."""
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._where = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._where

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor


def loaded(shards: Iterable[WeightShard], folder: Path, ranks: Ranks) -> HandOver | None:
    """Masters at the start of a stage against the files that they came from; collective.

    Args:
        shards: this rank's masters.
        folder: initial weights, as the stage before exported them.
        ranks: this process.

    Returns:
        None: nothing there was learned by a stage before, or none of it is trained on (an adapter
        beside frozen weights).
    """
    squares = read_movement(folder)
    if squares is None:
        return None
    stored = StoredWeights(folder)
    error, moved, count = 0.0, 0.0, 0
    for shard in shards:
        if shard.name not in stored or shard.name not in squares:
            continue
        count += 1
        moved += squares[shard.name]
        # Not read where another rank has all of it.
        if number := shard.values.numel():
            whole = stored.read(shard.name).flatten()
            mine = whole[shard.start : shard.start + number]
            if whole.dtype == torch.float32:
                error += squared_distance(shard.values, mine)
            else:
                # A file that was rounded later: what it held before is not to be known any more.
                error += squares[shard.name] * number / whole.numel()
    total = sum(ranks.gather(error))
    return HandOver("load", moved**0.5, total**0.5) if count else None


class MasterSample:
    """A few values of each master, by place: what a checkpoint must give back.

    Places depend on a weight's size alone, so any number of ranks can compare.
    """

    def __init__(self, shards: Callable[[], Iterable[WeightShard]], ranks: Ranks) -> None:
        """Sample the masters that `shards` gives, anew at every call."""
        self._shards, self._ranks = shards, ranks

    def take(self) -> dict[str, tuple[int, Tensor]]:
        """(number of the first place, values) by name, copied."""
        taken = {}
        for shard in self._shards():
            stride = max(1, math.prod(shard.shape) // _SAMPLES)
            first = -(-shard.start // stride)
            values = shard.values[first * stride - shard.start :: stride]
            taken[shard.name] = (first, values.clone())
        return taken

    def take_write(self, folder: Path, copies: HostCopies) -> Callable[[], None]:
        """Copy now; the returned function writes this rank's values into `folder` later."""
        taken = {name: part for name, part in self.take().items() if part[1].numel()}
        values = copies.take(SAMPLE_FILES, {name: part for name, (_, part) in taken.items()})
        return partial(
            save_file,
            values,
            folder / SAMPLE_FILES.replace("*", f"rank{self._ranks.rank:05d}"),
            metadata={"first": json.dumps({name: first for name, (first, _) in taken.items()})},
        )

    def resumed(self, folder: Path, before: Mapping[str, tuple[int, Tensor]]) -> HandOver | None:
        """Masters as a checkpoint gave them back against the values saved with it; collective.

        Args:
            folder: the checkpoint.
            before: `take` before it was loaded, which is where training started.

        Returns:
            None: the checkpoint holds no sample.
        """
        saved: dict[str, dict[int, float]] = {}
        for path in sorted(folder.glob(SAMPLE_FILES)):
            with reading(path):
                file = safe_open(path, framework="pt")
                for name, first in json.loads(file.metadata()["first"]).items():
                    values = file.get_tensor(name).tolist()
                    saved.setdefault(name, {}).update(enumerate(values, first))
        if not saved:
            return None
        error = moved = 0.0
        for name, (first, now) in self.take().items():
            places = range(first, first + now.numel())
            given = torch.tensor([saved[name][place] for place in places], dtype=torch.float32)
            error += squared_distance(now, given)
            moved += squared_distance(given, before[name][1])
        parts = self._ranks.gather((error, moved))
        return HandOver("resume", sum(m for _, m in parts) ** 0.5, sum(e for e, _ in parts) ** 0.5)


def note_hand_over(state_dir: Path, hand_over: HandOver) -> None:
    """Add a line to the state's list."""
    with (state_dir / HAND_OVERS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(hand_over)) + "\n")


def noted_hand_overs(state_dir: Path) -> list[HandOver]:
    """Every hand-over that was measured, oldest first."""
    path = state_dir / HAND_OVERS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [HandOver(**json.loads(line)) for line in lines]
