"""Run VAE post-training in this process, or in several ranks on this host.

`python -m components.training.vae.worker JOB.json` is what a launched rank executes.
"""

from __future__ import annotations

from components.models.loading.base_autoencoder import load_base_autoencoder
from components.settings.bad_input import BadInput
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoints import DiskFull, full_disks_named
from components.training.distributed.divergence import TrainingDiverged
from components.training.distributed.interruption import StopRequest, listening
from components.training.distributed.rank_jobs import rank_main, run_in_ranks
from components.training.distributed.ranks import (
    Ranks,
    collective_timeout,
    deterministic_torch,
    open_ranks,
)
from components.training.vae.crops import TileCrops, TilesDamaged
from components.training.vae.export import autoencoder_about, export_training
from components.training.vae.job import VaeJob, cut_tiles
from components.training.vae.trainer import check_batch, train_vae

WORKER = "components.training.vae.worker"
LASTING = (TrainingDiverged, TilesDamaged, BadInput, DiskFull, ValueError, PermissionError)
"""Failures that another attempt would only repeat."""


def run_job(job: VaeJob) -> None:
    """Cut tiles, train, and export to `job.export_dir`; continues where a killed run stopped.

    Raises:
        ValueError: a slice is empty, an original is missing, no photograph can be used, or the
            batch does not divide over the processes.
        NoRoomForTiles: the disk is too small for the tiles.
        TrainingDiverged: training diverged (with several ranks: `TrainingRefused`).
        DiskFull: no room for a checkpoint (with several ranks: `TrainingRefused`).
        TrainingFailed: (several ranks) a rank failed; names it, its last words and the logs.
    """
    # Before photographs are cut and processes started, which takes minutes.
    check_batch(job.settings, job.runtime.processes * job.runtime.nodes)
    # Before any rank starts, so that they do not all decode the same files.
    run_in_ranks(job.model_copy(update={"tiles": cut_tiles(job)}), WORKER, train_here)


def train_here(job: VaeJob) -> None:
    """This process's share of the training; rank 0 exports."""
    wait = collective_timeout(job.runtime)
    ranks_here = open_ranks(job.runtime.device, wait)
    here = deterministic_torch(job.runtime.torch_threads, job.runtime.determinism)
    with full_disks_named(job.export_dir), here, ranks_here as ranks, listening() as stop:
        _train(job, ranks, stop)


def _train(job: VaeJob, ranks: Ranks, stop: StopRequest) -> None:
    autoencoder = load_base_autoencoder(job.autoencoder, job.seed, job.root)
    # `run_job` has cut them before any rank started.
    assert job.tiles is not None
    photographs, held_out = TileCrops(job.tiles.training), TileCrops(job.tiles.held_out)
    training = train_vae(
        autoencoder,
        photographs,
        held_out,
        job.settings,
        ranks,
        seed=job.seed,
        state_dir=job.state_dir,
        metrics=MetricLog(job.metrics),
        stop=stop,
        begun_at=job.begun_at,
    )
    if ranks.is_first:
        left_out = {"vae": photographs.left_out, "eval": held_out.left_out}
        pretrained = job.autoencoder.pretrained
        about = autoencoder_about(
            None if pretrained is None else job.root / pretrained, job.seed, job.settings.crop_px
        )
        export_training(autoencoder.cpu(), training, job.export_dir, left_out, about)
    # A rank that leaves ends its part of the process group, so all wait for the export.
    ranks.barrier()


if __name__ == "__main__":
    rank_main(VaeJob, WORKER, train_here, LASTING)
