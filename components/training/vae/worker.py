"""Run VAE post-training in this process, or in several ranks on this host.

`python -m components.training.vae.worker JOB.json` is what a launched rank executes.
"""

from __future__ import annotations

from components.files.weight_folders import WeightsMissing
from components.images.decoding import ImageUndecodable
from components.images.original_lookup import Original
from components.models.loading.base_autoencoder import load_base_autoencoder
from components.telemetry.metric_log import MetricLog
from components.training.distributed.rank_jobs import rank_main, run_in_ranks
from components.training.distributed.ranks import (
    Ranks,
    collective_timeout,
    deterministic_torch,
    open_ranks,
)
from components.training.vae.crops import Photograph, PhotographTooSmall, WorkingCopies
from components.training.vae.export import export_training
from components.training.vae.job import VaeJob
from components.training.vae.trainer import LossNotFinite, train_vae

WORKER = "components.training.vae.worker"
LASTING = (LossNotFinite, PhotographTooSmall, ImageUndecodable, WeightsMissing, ValueError)
"""Failures that another attempt would only repeat."""


def run_job(job: VaeJob) -> None:
    """Train, and export to `job.export_dir`; continues from the newest checkpoint.

    Raises:
        LossNotFinite: training diverged (with several ranks: `TrainingRefused`).
        TrainingFailed: (several ranks) a rank failed; names it, its last words and the logs.
    """
    # Before any rank starts, so that they do not all decode the same files.
    _copies(job, job.photographs)
    _copies(job, job.held_out)
    run_in_ranks(job, WORKER, train_here)


def _copies(job: VaeJob, originals: tuple[Original, ...]) -> WorkingCopies:
    photographs = [Photograph(original.image_id, original) for original in originals]
    return WorkingCopies(
        photographs,
        job.settings.crop_px,
        job.state_dir / "photographs",
        max_megapixels=job.max_megapixels,
    )


def train_here(job: VaeJob) -> None:
    """This process's share of the training; rank 0 exports."""
    wait = collective_timeout(job.runtime)
    ranks_here = open_ranks(job.runtime.device, wait)
    with deterministic_torch(job.runtime.torch_threads), ranks_here as ranks:
        _train(job, ranks)


def _train(job: VaeJob, ranks: Ranks) -> None:
    autoencoder = load_base_autoencoder(job.autoencoder, job.seed, job.root)
    training = train_vae(
        autoencoder,
        _copies(job, job.photographs),
        _copies(job, job.held_out),
        job.settings,
        ranks,
        seed=job.seed,
        state_dir=job.state_dir,
        metrics=MetricLog(job.metrics),
    )
    if ranks.is_first:
        export_training(autoencoder.cpu(), training, job.export_dir)
    # A rank that leaves ends its part of the process group, so all wait for the export.
    ranks.barrier()


if __name__ == "__main__":
    rank_main(VaeJob, WORKER, train_here, LASTING)
