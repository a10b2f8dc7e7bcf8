"""One process of a DiT training run: `python -m components.training.dit.worker JOB.json`.

With `--join`, on the further nodes of a run: launch this node's processes.

`run_job` is the front door: one process trains right here, more are launched through torchrun,
and both go through `train_here`.
"""

from __future__ import annotations

import sys

from components.settings.bad_input import BadInput
from components.training.distributed.checkpoints import DiskFull, full_disks_named
from components.training.distributed.divergence import TrainingDiverged
from components.training.distributed.interruption import listening
from components.training.distributed.rank_jobs import rank_main, run_in_ranks
from components.training.distributed.ranks import (
    collective_timeout,
    deterministic_torch,
    open_ranks,
)
from components.training.dit.job import DitJob, StartUnusable
from components.training.dit.trainer import train
from components.training.encoding.own_prompts import embed_own_prompts
from components.training.sharded.engine import micro_batches_per_step

WORKER = "components.training.dit.worker"
# Everything else is restarted, such as a lost connection or a killed rank.
LASTING = (TrainingDiverged, DiskFull, BadInput, ValueError, LookupError, PermissionError)
"""Failures that another attempt would only repeat."""


def run_job(job: DitJob) -> None:
    """Train `job` to its end with `job.runtime.processes` processes on this node.

    Raises:
        StartUnusable: the global batch does not divide over the processes.
        TrainingDiverged: (one process) a loss or gradient is not finite.
        CheckpointFailed: (one process) a checkpoint could not be written.
        TrainingRefused: (several processes) a rank failed in a way that a retry would repeat.
        TrainingFailed: (several processes) a rank failed; names it, its last words and the logs.
    """
    runtime = job.runtime
    try:
        # Before processes are started, which takes a minute and more.
        micro_batches_per_step(
            job.settings, runtime.processes * runtime.nodes, runtime.context_parallel_degree
        )
    except ValueError as problem:
        raise StartUnusable(f"{job.name}.{problem}") from None
    _embed_own_prompts(job)
    run_in_ranks(job, WORKER, train_here)


def _embed_own_prompts(job: DitJob) -> None:
    """Before any network of training is made, and in one process: text encoders are large.

    Pictures are no reason to stop: where the encoders cannot be had a line says so.
    """
    prompts = [own.prompt for own in job.settings.samples.own_prompts]
    if not prompts or job.autoencoder is None:
        return
    # The bits of a sum depend on the number of threads.
    with deterministic_torch(job.runtime.torch_threads):
        backbone = job.transformer.backbone
        problem = embed_own_prompts(prompts, job.texts, job.text_encoders, backbone, job.state_dir)
    if problem is not None:
        print(f"{job.name}: no pictures of samples.own_prompts: {problem}", file=sys.stderr)


def train_here(job: DitJob) -> None:
    """This process's share of the training."""
    wait = collective_timeout(job.runtime)
    # Not entered yet: threads and kernels are settled before the group exists.
    ranks_here = open_ranks(job.runtime.device, wait, job.runtime.context_parallel_degree)
    here = deterministic_torch(job.runtime.torch_threads, job.runtime.determinism)
    with full_disks_named(job.export_dir), here, ranks_here as ranks, listening() as stop:
        train(job, ranks, stop)


if __name__ == "__main__":
    rank_main(DitJob, WORKER, train_here, LASTING)
