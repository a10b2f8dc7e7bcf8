"""Everything that decides a VAE post-training run, and how slices come to such a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from components.corpus.manifest import read_table
from components.engine.ordered_pool import EngineLimits
from components.images.original_lookup import OriginalLookup
from components.settings.models import AutoencoderSettings
from components.settings.runtime import RuntimeSettings
from components.settings.schema import Settings
from components.settings.training import VaeSettings
from components.training.vae.tile_store import NoTiles, make_tiles
from components.training.vae.tiles import Photograph, TileRules


@dataclass(frozen=True)
class JobTiles:
    """Stores of the tiles that a run trains on and measures on."""

    training: Path
    held_out: Path


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
    training: Path
    """Parquet slice of the photographs to train on."""
    held_out: Path
    """Parquet slice of those to measure on."""
    tiles_dir: Path
    """Tiles of all settings; every rank reads it, so nodes share it."""
    state_dir: Path
    """Checkpoints, batches that made the loss diverge."""
    max_megapixels: float
    """Bound on decoded photographs."""
    limits: EngineLimits
    """Of the workers that cut tiles."""
    tiles: JobTiles | None = None
    """What `cut_tiles` made; None before."""
    export_dir: Path
    metrics: Path
    """JSONL metric log."""
    begun_at: int = 0
    """Steps done when the newest segment began; 0: nothing has changed under way."""


def slices_job(
    settings: Settings,
    *,
    root: Path,
    training: Path,
    held_out: Path,
    tiles_dir: Path,
    state_dir: Path,
    export_dir: Path,
    metrics: Path,
    begun_at: int = 0,
) -> VaeJob:
    """The job of training on one slice of the corpus and measuring on another.

    Args:
        settings: of the project.
        root: where URIs and relative weight folders start.
        training: see `VaeJob`.
        held_out: see `VaeJob`.
        tiles_dir: see `VaeJob`.
        state_dir: see `VaeJob`.
        export_dir: see `VaeJob`.
        metrics: see `VaeJob`.
        begun_at: see `VaeJob`.
    """
    return VaeJob(
        settings=settings.vae,
        autoencoder=settings.models.autoencoder,
        runtime=settings.runtime,
        seed=settings.project.seed,
        root=root,
        training=training,
        held_out=held_out,
        tiles_dir=tiles_dir,
        state_dir=state_dir,
        max_megapixels=settings.ingest.max_megapixels,
        limits=EngineLimits.of(settings),
        export_dir=export_dir,
        metrics=metrics,
        begun_at=begun_at,
    )


def cut_tiles(job: VaeJob) -> JobTiles:
    """Cut the tiles of both slices where they are missing; continues where a kill stopped it.

    Raises:
        ValueError: a slice is empty, an original is missing, or no photograph can be used.
        NoRoomForTiles: the disk is too small.
    """
    lookup = OriginalLookup(job.root)
    return JobTiles(
        _cut(job, lookup, job.training),
        # In turn, one crop each: more photographs than crops would never be looked at.
        _cut(job, lookup, job.held_out, at_most=job.settings.eval_crops),
    )


def _cut(job: VaeJob, lookup: OriginalLookup, path: Path, at_most: int | None = None) -> Path:
    settings = job.settings
    rules = TileRules(
        settings.crop_px, settings.tile_px, settings.tiles_per_photograph, job.max_megapixels
    )
    try:
        return make_tiles(
            _photographs(lookup, path, job.root),
            rules,
            job.tiles_dir,
            limits=job.limits,
            max_rejected_fraction=settings.max_rejected_fraction,
            at_most=at_most,
        )
    except NoTiles as problem:
        raise NoTiles(f"{_named(path, job.root)}: {problem}") from None


def _named(path: Path, root: Path) -> Path:
    # By the path from the root: messages must not depend on where a clone lies.
    return path.relative_to(root) if path.is_relative_to(root) else path


def _photographs(lookup: OriginalLookup, path: Path, root: Path) -> list[Photograph]:
    """The images of one slice, ordered by id (the order decides which crop a number means)."""
    table = read_table(path)
    if table.empty:
        raise ValueError(
            f"{_named(path, root)} is empty; relax the rules in `select` or add photos"
        )
    # An image that stands in several rows is still one photograph.
    rows = table.drop_duplicates("image_id").sort_values("image_id")
    return [Photograph(one.image_id, one) for one in lookup.find_all(rows)]
