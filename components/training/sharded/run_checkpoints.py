"""All that a run divided over ranks must remember, saved and loaded as one.

A checkpoint holds DeepSpeed's files (weights, float32 masters, moments), every rank's share of the
average, and `trainer.json` with the position in the batch plan. Noise and batches are functions of
the step, so there is no state of a random generator to keep.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.files.whole_files import write_text
from components.training.distributed.checkpoint_writer import CheckpointWriter
from components.training.distributed.checkpoints import CheckpointStore, reading
from components.training.distributed.ranks import Ranks
from components.training.sharded.ema import WeightAverage
from components.training.sharded.hand_over import HandOver, MasterSample
from components.training.sharded.host_copies import HostCopies
from components.training.sharded.weight_shards import master_shards

STATE_FILE = "trainer.json"
ENGINE_FOLDER = "engine"


@dataclass(frozen=True)
class SavedRun:
    """A whole checkpoint, of which only the small state file has been read."""

    step: int
    """Optimizer steps done."""
    folder: Path
    plan: Mapping[str, Any]
    """Position in the batch plan, as it was given to `RunCheckpoints.write`."""
    ema_updates: int
    guard: Mapping[str, Any] | None
    """State of the divergence guard; None: an older checkpoint."""
    started_from: str | None
    """What the run's weights began as; None: an older checkpoint."""


class RunCheckpoints:
    """Checkpoints of one engine and the average of its weights."""

    def __init__(
        self,
        engine: Any,
        average: WeightAverage,
        ranks: Ranks,
        folder: Path,
        *,
        started_from: str,
        keep: int,
        in_background: bool,
        is_needed: Callable[[int, int], bool] = lambda step, newest: False,
    ) -> None:
        """Let `engine` save through copies in host memory; nothing is read or written yet.

        Args:
            engine: a `deepspeed.DeepSpeedEngine`.
            average: of its weights.
            ranks: this process.
            folder: of the checkpoints.
            started_from: what the weights began as; every checkpoint says it.
            keep: how many of the newest stay.
            in_background: whether files are written beside the next steps.
            is_needed: see `CheckpointStore`.
        """
        # Imports DeepSpeed, for which `open_ranks` has made the environment.
        from components.training.sharded import engine_snapshot

        self._engine, self._average, self._ranks = engine, average, ranks
        self.started_from = started_from
        self.store = CheckpointStore(
            folder,
            keep,
            rank=ranks.rank,
            world_size=ranks.world_size,
            barrier=ranks.barrier,
            on_any_rank=lambda flag: ranks.any(flag)[0],
            is_needed=is_needed,
        )
        self.writer = CheckpointWriter(self.store, in_background=in_background)
        # One set of buffers for the engine's and the average's copies: every save reuses them.
        self._copies = HostCopies()
        engine_snapshot.install(engine, ranks, self._copies)
        self._sample = MasterSample(partial(master_shards, engine, ranks), ranks)

    def write(
        self, step: int, plan: Mapping[str, Any], guard: Mapping[str, Any], *, healthy: bool
    ) -> None:
        """Copy the state after `step` steps and hand it to the writer; collective.

        Training may change its state as soon as this returns.

        Args:
            step: optimizer steps done.
            plan: position in the batch plan.
            guard: state of the divergence guard.
            healthy: what it says of the steps before.

        Raises:
            CheckpointFailed: the checkpoint before could not be written, or, where writing is not
                in the background, this one.
        """
        from components.training.sharded import engine_snapshot

        # The copies of the checkpoint before are overwritten below, so it must be on disk.
        self.writer.wait()
        # Collective, as is the engine's copying below: no rank may leave a save out.
        opened = self.store.begin(step, healthy=healthy)
        folder = opened.aside
        writes = engine_snapshot.engine_writes(self._engine, folder, ENGINE_FOLDER)
        writes.append(self._average.take_write(folder, self._copies))
        writes.append(self._sample.take_write(folder, self._copies))
        # These are the same on every rank.
        if self._ranks.is_first:
            state = {
                "plan": dict(plan),
                "ema_updates": self._average.updates,
                "processes": self._ranks.world_size,
                "guard": dict(guard),
                "started_from": self.started_from,
            }
            # Made now and written later: the counters go on with training.
            text = json.dumps(state, indent=1)
            writes.append(lambda: write_text(folder / STATE_FILE, text, durable=True))
        # On CUDA the copies are only queued so far: the writer waits for them before it reads.
        self.writer.submit(opened, [self._copies.fence(), *writes])

    def newest(self) -> SavedRun | None:
        """The newest whole and intact checkpoint; None: there is none; collective.

        Raises:
            CheckpointUnreadable: see `CheckpointStore.latest_intact`.
        """
        newest = self.store.latest_intact()
        return None if newest is None else _saved(*newest)

    def healthy_at(self, step: int) -> SavedRun | None:
        """The healthy checkpoint after `step` steps; None: there is none; collective."""
        folder = self.store.healthy_at(step)
        return None if folder is None else _saved(step, folder)

    def load(self, saved: SavedRun) -> HandOver | None:
        """Put engine and average back to a checkpoint; collective.

        Returns:
            How much of the movement since the start came back; None: an older checkpoint, which
            holds no sample.

        Raises:
            ValueError: it is of another network, or of a number of processes that cannot go on.
        """
        from components.training.sharded import engine_snapshot

        before = self._sample.take()
        engine_snapshot.load_engine(self._engine, saved.folder, ENGINE_FOLDER)
        self._average.load(saved.folder, saved.ema_updates)
        return self._sample.resumed(saved.folder, before)


def _saved(step: int, folder: Path) -> SavedRun:
    # Only the small file: the plan is checked before gigabytes are read.
    with reading(folder / STATE_FILE):
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return SavedRun(
            step,
            folder,
            state["plan"],
            state["ema_updates"],
            state.get("guard"),
            state.get("started_from"),
        )
