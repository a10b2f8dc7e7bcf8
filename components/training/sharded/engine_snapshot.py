"""DeepSpeed's checkpoint files, taken as copies in memory instead of written at once.

DeepSpeed lets a checkpoint engine decide what `save` does with each file's content. This one copies
it to host memory (`HostCopies`) and remembers how to write it, so `save_checkpoint` returns after
the copy. DeepSpeed's own decoupled engine does not fit: it starts a process per rank, waits in
`commit` inside the training loop, and swallows errors of that process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from components.models.loading.quantisation import is_quantised
from components.training.distributed.checkpoints import reading
from components.training.distributed.ranks import Ranks
from components.training.sharded.elastic_resume import WorldSizeUnsupported, rank_files, repartition
from components.training.sharded.host_copies import HostCopies

_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed puts into its files beside tensors and plain values."""
_OPTIMIZER_FILE = "_optim_states.pt"
_OPTIMIZER_KEY = "optimizer_state_dict"
_PROCESSES_KEY = "dp_world_size"
_MODULE_KEY = "module"
# ZeRO 3 has a model file per rank, below 3 there is one for all.
_PARTITIONED_MODEL = "zero_pp_rank_"


class SnapshotEngine(CheckpointEngine):  # type: ignore[misc]
    """Checkpoint engine of one DeepSpeed engine; reads without running code from the file.

    Reading a checkpoint of another number of processes gives each rank its part of it.
    """

    def __init__(self, engine: Any, ranks: Ranks, copies: HostCopies) -> None:
        """Copy with `copies`; `engine` is the `DeepSpeedEngine` whose state is loaded."""
        super().__init__()
        self.name = "SnapshotEngine"
        self._engine = engine
        self._ranks = ranks
        self._copies = copies
        # Until the model's file says otherwise, which DeepSpeed loads before the optimizer's.
        self._saved_by = ranks.world_size
        self._writes: list[Callable[[], None]] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """Forget the checkpoint before."""
        self._writes = []

    def save(self, state_dict: Any, path: str) -> None:
        """Copy one file's content."""
        file = Path(path)
        if _MODULE_KEY in state_dict:
            state_dict = {**state_dict, _MODULE_KEY: self._without_scales(state_dict[_MODULE_KEY])}
        # By the name alone, which is the same in every checkpoint, so that memory is used again.
        copied = self._copies.take(file.name, state_dict)
        self._writes.append(partial(write_state, copied, file))

    def _without_scales(self, weights: Any) -> Any:
        """The module's state without what belongs to frozen 4-bit weights, which are left out."""
        rounded = tuple(
            f"{name}."
            for name, parameter in self._engine.module.named_parameters()
            if not parameter.requires_grad and is_quantised(parameter)
        )
        if not rounded or weights is None:
            return weights
        return {name: value for name, value in weights.items() if not name.startswith(rounded)}

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; only tensors, plain values and a few classes of DeepSpeed's.

        Raises:
            WorldSizeUnsupported: another number of processes wrote it, and it cannot be cut anew.
        """
        file = Path(path)
        if file.name.endswith(_OPTIMIZER_FILE) and self._saved_by != self._ranks.world_size:
            # DeepSpeed asks for the file of this rank, which may not exist: all old ones are cut
            # anew.
            files = rank_files(file, self._saved_by)
            # Mapped, because every rank opens the files of all old ranks and needs a part of each.
            states = [read_state(other, mmap=True)[_OPTIMIZER_KEY] for other in files]
            here = self._engine.optimizer.state_dict()
            return {_OPTIMIZER_KEY: repartition(states, here, self._ranks.rank)}
        state = read_state(file, map_location)
        if _PROCESSES_KEY in state:
            self._saved_by = state[_PROCESSES_KEY]
            is_partitioned = file.name.startswith(_PARTITIONED_MODEL)
            if is_partitioned and self._saved_by != self._ranks.world_size:
                raise WorldSizeUnsupported(
                    f"{file.parent.parent}: a ZeRO 3 checkpoint of {self._saved_by} processes, "
                    f"here are {self._ranks.world_size}: use the same number, or delete the "
                    "checkpoints to start again"
                )
            # DeepSpeed refuses other numbers of processes by this entry.
            state[_PROCESSES_KEY] = self._ranks.world_size
        return state

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing is written yet; the caller commits."""
        return True

    def take_writes(self) -> list[Callable[[], None]]:
        """One function per file of the checkpoint just saved."""
        writes, self._writes = self._writes, []
        return writes


def write_state(state: Any, file: Path) -> None:
    """`torch.save` through a Python file, whose errors keep the system's error number."""
    with file.open("wb") as stream:
        torch.save(state, stream)


def read_state(file: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """Read what `write_state` wrote; with `mmap` the elements that are used, when they are."""
    with reading(file), torch.serialization.safe_globals(_CLASSES):
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)


def install(engine: Any, ranks: Ranks, copies: HostCopies) -> None:
    """Let `engine` (a `DeepSpeedEngine`) save and load through a `SnapshotEngine`."""
    engine.checkpoint_engine = SnapshotEngine(engine, ranks, copies)


def engine_writes(engine: Any, folder: Path, tag: str) -> list[Callable[[], None]]:
    """Copy the state of `engine`; collective.

    Weights that are not trained (the base of an adapter) are those that the job starts from and
    are left out, except by ZeRO-3.

    Args:
        engine: a `DeepSpeedEngine` after `install`.
        folder: the checkpoint; DeepSpeed's folders below it are made now.
        tag: DeepSpeed's folder below `folder`.

    Returns:
        Functions that write this rank's files, in any thread; one after the other.
    """
    # ZeRO-3 has no whole weights to leave out.
    engine.save_checkpoint(
        str(folder),
        tag=tag,
        # The store moves its own pointer once all files are there; DeepSpeed would move one now.
        save_latest=False,
        exclude_frozen_parameters=not engine.zero_optimization_partition_weights(),
    )
    writes: list[Callable[[], None]] = engine.checkpoint_engine.take_writes()
    return writes


def load_engine(engine: Any, folder: Path, tag: str) -> None:
    """Load what `engine_writes` wrote into an engine of the same job; collective.

    Args:
        engine: a `DeepSpeedEngine` after `install`, with the weights that the job starts from.
        folder: the checkpoint.
        tag: DeepSpeed's folder below `folder`.

    Raises:
        ValueError: the trained weights are not those of this network.
    """
    whole = engine.zero_optimization_partition_weights()
    # ZeRO-3 leaves no weights out, so there is nothing to forgive.
    load = None if whole else _load_trained
    engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=load)


def _load_trained(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    # Frozen weights are not in the checkpoint, so what is missing is judged below.
    found = dst.load_state_dict(src, strict=False)
    frozen = {name for name, weights in dst.named_parameters() if not weights.requires_grad}
    wrong = sorted(set(found.missing_keys) - frozen) + sorted(found.unexpected_keys)
    if wrong:
        raise ValueError(f"the checkpoint is of another network; they differ in {wrong[:3]}")
