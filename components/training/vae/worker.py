"""Run VAE post-training in this process, or in several ranks on this host.

`python -m components.training.vae.worker JOB.json` is what a launched rank executes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from components.files.weight_folders import WeightsMissing
from components.files.whole_files import write_text
from components.images.decoding import ImageUndecodable
from components.images.original_lookup import Original
from components.models.loading.base_autoencoder import load_base_autoencoder
from components.settings.models import AutoencoderSettings
from components.settings.runtime import RuntimeSettings
from components.settings.training import VaeSettings
from components.telemetry.metric_log import MetricLog
from components.training.distributed.ranks import (
    Ranks,
    collective_timeout,
    deterministic_torch,
    exit_with_parent,
    open_ranks,
)
from components.training.distributed.supervision import launch, reporting_failures
from components.training.vae.crops import Photograph, PhotographTooSmall, WorkingCopies
from components.training.vae.export import export_training
from components.training.vae.trainer import LossNotFinite, train_vae

JOB_FILE = "job.json"
WORKER = "components.training.vae.worker"
LASTING = (LossNotFinite, PhotographTooSmall, ImageUndecodable, WeightsMissing, ValueError)
"""Failures that another attempt would only repeat."""


class VaeJob(BaseModel):
    """Everything that decides a run; travels to the ranks as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: VaeSettings
    autoencoder: AutoencoderSettings
    runtime: RuntimeSettings
    seed: int
    root: Path
    """Repository root: relative weight folders start here."""
    photographs: tuple[Original, ...]
    held_out: tuple[Original, ...]
    state_dir: Path
    """Checkpoints, working copies of photographs, batches that made the loss diverge."""
    max_megapixels: float
    """Bound on decoded photographs."""
    export_dir: Path
    metrics: Path
    """JSONL metric log."""


def run_job(job: VaeJob) -> None:
    """Train, and export to `job.export_dir`; continues from the newest checkpoint.

    Raises:
        LossNotFinite: training diverged (with several ranks: `TrainingRefused`).
        TrainingFailed: (several ranks) a rank failed; names it, its last words and the logs.
    """
    job.state_dir.mkdir(parents=True, exist_ok=True)
    # Before any rank starts, so that they do not all decode the same files.
    _copies(job, job.photographs)
    _copies(job, job.held_out)
    if job.runtime.processes * job.runtime.nodes == 1:
        train_here(job)
        return
    path = job.state_dir / JOB_FILE
    write_text(path, job.model_dump_json(indent=1))
    launch(WORKER, [str(path.resolve())], job.runtime, job.state_dir)


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
    ranks.barrier()


def main() -> None:
    """Entry point of a launched rank."""
    exit_with_parent()
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    job = VaeJob.model_validate_json(text, strict=False)
    if "--join" in sys.argv:
        launch(WORKER, sys.argv[1:2], job.runtime, job.state_dir, joins=True)
        return
    with reporting_failures(LASTING):
        train_here(job)


if __name__ == "__main__":
    main()
