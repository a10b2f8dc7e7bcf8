"""Everything that decides a VAE post-training run, and how slices come to such a job."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from components.corpus.manifest import read_table
from components.images.original_lookup import Original, OriginalLookup
from components.settings.models import AutoencoderSettings
from components.settings.runtime import RuntimeSettings
from components.settings.schema import Settings
from components.settings.training import VaeSettings


class VaeJob(BaseModel):
    """Everything that decides a run; travels to the ranks as JSON."""

    # Forbidden extras: a job file of another version must fail and not be half understood.
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


def slices_job(
    settings: Settings,
    *,
    root: Path,
    training: Path,
    held_out: Path,
    state_dir: Path,
    export_dir: Path,
    metrics: Path,
) -> VaeJob:
    """The job of training on one slice of the corpus and measuring on another.

    Args:
        settings: of the project.
        root: where URIs and relative weight folders start.
        training: Parquet slice of the photographs to train on.
        held_out: Parquet slice of those to measure on.
        state_dir: see `VaeJob`.
        export_dir: see `VaeJob`.
        metrics: see `VaeJob`.

    Raises:
        ValueError: a slice is empty, or an original is missing.
    """
    lookup = OriginalLookup(root)
    return VaeJob(
        settings=settings.vae,
        autoencoder=settings.models.autoencoder,
        runtime=settings.runtime,
        seed=settings.project.seed,
        root=root,
        photographs=_photographs(lookup, training, root),
        held_out=_photographs(lookup, held_out, root),
        state_dir=state_dir,
        max_megapixels=settings.ingest.max_megapixels,
        export_dir=export_dir,
        metrics=metrics,
    )


def _photographs(lookup: OriginalLookup, path: Path, root: Path) -> tuple[Original, ...]:
    """The images of one slice, ordered by id (the order decides which crop a number means)."""
    table = read_table(path)
    # Named by the path from the root: messages must not depend on where a clone lies.
    if table.empty:
        named = path.relative_to(root) if path.is_relative_to(root) else path
        raise ValueError(f"{named} is empty; relax the rules in `select` or add photos")
    # An image that stands in several rows is still one photograph.
    rows = table.drop_duplicates("image_id").sort_values("image_id")
    return tuple(lookup.find_all(rows))
