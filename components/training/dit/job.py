"""Everything that decides a training run of the DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.models.backbones import BACKBONES
from components.settings.models import AutoencoderSettings, TransformerSettings
from components.settings.objective import ObjectiveSettings
from components.settings.runtime import RuntimeSettings
from components.settings.training import DitStageSettings

WEIGHTS_NAMES = ("raw", "ema")


class TrainingDiverged(RuntimeError):
    """A loss or gradient is not finite; the message names the step and the saved batch."""


class DitJob(BaseModel):
    """Everything that decides a training run; travels to the ranks as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Stage name, for progress and messages."""
    settings: DitStageSettings
    objective: ObjectiveSettings
    transformer: TransformerSettings
    runtime: RuntimeSettings
    seed: int
    latents: Path
    """Latent store."""
    texts: Path
    """Text store."""
    train_slice: Path | None
    """Parquet with image_id: train on these images only (None: all with split 'train')."""
    autoencoder: AutoencoderSettings | None
    """Decodes the sample grids, `pretrained` as a path from here; None: no grids."""
    initial_weights: Path | None
    """Transformer folder; None: the backbone's random tiny transformer."""
    state_dir: Path
    """Checkpoints, sample grids, and batches that made the loss diverge."""
    export_dir: Path
    """Where folders `raw` and `ema` are written."""
    metrics: Path
    """JSONL metric log."""


def build_transformer(job: DitJob, widths: tuple[int, int], latent_channels: int) -> Any:
    """The transformer that training starts from, float32."""
    backbone = BACKBONES[job.transformer.backbone]
    if job.initial_weights is not None:
        return backbone.load(job.initial_weights, job.transformer)
    return backbone.build_tiny(job.transformer, widths, latent_channels, job.seed)
