"""How long a checkpoint holds training up: written in place and beside training, in alternation.

    python benchmarks/checkpoint_stall.py [--heads 4 --layers 1] [--saves 5]

Blocked: time that the save itself takes from the training loop. With slow-down: blocked plus what
the following steps take longer than the median step while the thread still writes (on few cores
both want the processor). Both in units of the median undisturbed step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from synthetic_job import make_job, write_stores

from components.training.distributed.checkpoint_writer import CheckpointWriter
from components.training.distributed.ranks import deterministic_torch, open_ranks
from components.training.dit.assembly import assemble_run
from components.training.dit.trainer import DitTrainer

STEPS_BETWEEN = 5


def step_s(trainer: DitTrainer) -> float:
    """Duration of one optimizer step, its batch already loaded."""
    batches = trainer._load(trainer.step)
    begin = time.perf_counter()
    trainer._optimize(trainer.step, batches)
    trainer.step += 1
    return time.perf_counter() - begin


def measure(trainer: DitTrainer, saves: int) -> None:
    """Print the stall of both ways."""
    for _ in range(STEPS_BETWEEN):
        step_s(trainer)
    typical = statistics.median(step_s(trainer) for _ in range(4 * STEPS_BETWEEN))
    blocked: dict[bool, list[float]] = {False: [], True: []}
    total: dict[bool, list[float]] = {False: [], True: []}
    # The first save of all allocates the host memory that later ones use again.
    for number in range(2 * saves + 1):
        beside = number % 2 == 1
        checkpoints = trainer.parts.checkpoints
        checkpoints.writer = CheckpointWriter(checkpoints.store, in_background=beside)
        begin = time.perf_counter()
        trainer._write_checkpoint()
        stall = time.perf_counter() - begin
        slowed = sum(step_s(trainer) - typical for _ in range(STEPS_BETWEEN))
        checkpoints.writer.wait()
        if number:
            blocked[beside].append(stall / typical)
            total[beside].append((stall + slowed) / typical)
    parameters = sum(p.numel() for p in trainer.engine.module.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, step {typical * 1e3:.0f} ms, {os.cpu_count()} cores,"
        f" {trainer.ranks.device}, load {os.getloadavg()[0]:.1f}, {saves} saves each,"
        " medians in steps"
    )
    for beside, name in ((False, "written in place"), (True, "beside training")):
        print(
            f"  {name:17} blocked {statistics.median(blocked[beside]):6.2f}   "
            f"with slow-down {statistics.median(total[beside]):6.2f}"
        )


def main() -> None:
    """Measure one size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--saves", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_stores(Path(folder))
        job = make_job(
            Path(folder),
            Path(folder),
            heads=options.heads,
            layers=options.layers,
            stage={"global_batch_size": 4, "micro_batch_size": 4},
        )
        with deterministic_torch(1), open_ranks(job.runtime.device) as ranks:
            measure(DitTrainer(assemble_run(job, ranks)), options.saves)


if __name__ == "__main__":
    main()
