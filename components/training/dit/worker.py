"""One process of a DiT training run: `python -m components.training.dit.worker JOB.json`.

With `--join`, on the further nodes of a run: launch this node's processes.

`run_job` is the front door: one process trains right here, more are launched through torchrun,
and both go through `train_here`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from components.files.weight_folders import WeightsMissing
from components.files.whole_files import write_text
from components.training.distributed.checkpoints import DiskFull
from components.training.distributed.ranks import (
    collective_timeout,
    deterministic_torch,
    exit_with_parent,
    open_ranks,
)
from components.training.distributed.supervision import launch, reporting_failures
from components.training.dit.job import DitJob, TrainingDiverged
from components.training.dit.trainer import train

JOB_FILE = "job.json"
WORKER = "components.training.dit.worker"
LASTING = (TrainingDiverged, DiskFull, WeightsMissing, ValueError, LookupError, PermissionError)
"""Failures that another attempt would only repeat."""


def run_job(job: DitJob) -> None:
    """Train `job` to its end with `job.runtime.processes` processes on this node.

    Raises:
        TrainingDiverged: (one process) a loss or gradient is not finite.
        CheckpointFailed: (one process) a checkpoint could not be written.
        TrainingRefused: (several processes) a rank failed in a way that a retry would repeat.
        TrainingFailed: (several processes) a rank failed; names it, its last words and the logs.
    """
    if job.runtime.processes * job.runtime.nodes == 1:
        train_here(job)
        return
    job.state_dir.mkdir(parents=True, exist_ok=True)
    path = job.state_dir / JOB_FILE
    write_text(path, job.model_dump_json(indent=1))
    launch(WORKER, [str(path.resolve())], job.runtime, job.state_dir)


def train_here(job: DitJob) -> None:
    """This process's share of the training."""
    wait = collective_timeout(job.runtime)
    ranks_here = open_ranks(job.runtime.device, wait, job.runtime.context_parallel_degree)
    with deterministic_torch(job.runtime.torch_threads), ranks_here as ranks:
        train(job, ranks)


def main() -> None:
    """Entry point of a launched rank, or of a further node."""
    exit_with_parent()
    job = DitJob.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"), strict=False)
    if "--join" in sys.argv:
        launch(WORKER, sys.argv[1:2], job.runtime, job.state_dir, joins=True)
        return
    with reporting_failures(LASTING):
        train_here(job)


if __name__ == "__main__":
    main()
