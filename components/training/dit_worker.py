"""One process of a DiT training run: `python -m components.training.dit_worker JOB.json`.

`run_job` is the front door: one process trains right here, more are launched through torchrun,
and both go through `train_here`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from components.training.distributed import (
    deterministic_torch,
    exit_with_parent,
    launch,
    open_ranks,
)
from components.training.dit_trainer import DitJob, train

JOB_FILE = "job.json"


def run_job(job: DitJob) -> None:
    """Train `job` to its end with `job.runtime.processes` processes on this host.

    Raises:
        TrainingDiverged: (one process) a loss or gradient is not finite.
        TrainingFailed: (several processes) a rank failed; its message is on stderr.
    """
    if job.runtime.processes == 1:
        train_here(job)
        return
    job.state_dir.mkdir(parents=True, exist_ok=True)
    path = job.state_dir / JOB_FILE
    temporary = path.with_name(f".{JOB_FILE}.{os.getpid()}")
    temporary.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    temporary.replace(path)
    launch(
        "components.training.dit_worker",
        [str(path.resolve())],
        job.runtime.processes,
        job.runtime.device,
        job.runtime.torch_threads,
    )


def train_here(job: DitJob) -> None:
    """This process's share of the training."""
    with deterministic_torch(job.runtime.torch_threads), open_ranks(job.runtime.device) as ranks:
        train(job, ranks)


def main() -> None:
    """Entry point of a launched rank."""
    exit_with_parent()
    job = DitJob.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"), strict=False)
    train_here(job)


if __name__ == "__main__":
    main()
