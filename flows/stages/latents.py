"""Stage `latents`: encode training and held-out photographs with the frozen base encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.manifest import read_table
from components.engine.ordered_pool import WorkersDoNotStart
from components.files.weight_folders import WeightsMissing
from components.files.whole_files import whole_file, write_text
from components.models.loading.base_autoencoder import encoder_digest, load_base_autoencoder
from components.objectives.haar import BAND_NAMES
from components.training.distributed.ranks import deterministic_torch
from components.training.encoding.encoder_workers import Placement, encoder_limits
from components.training.encoding.latent_workers import LatentJob, latent_workers
from components.training.encoding.latents import (
    Workers,
    band_energy_shares,
    encode_corpus,
    encoding_items,
)
from components.training.stores.latent_store import LatentStore
from flows.stages.contract import StageContext, StageFailed, StageResult

# Stage 2 is a part of stage 1.
TABLES = ("stage1", "eval")


def run(context: StageContext) -> StageResult:
    """Write `data/latents/`: index.parquet and shards, summary.json, bands.csv, bands.png.

    Raises:
        StageFailed: no images, an image in two splits, weights are missing, or more photographs
            than the settings allow cannot be encoded.
    """
    settings = context.settings
    slices = [read_table(context.input("slices", f"{name}.parquet")) for name in TABLES]
    try:
        items = encoding_items(pd.concat(slices), context.root)
        autoencoder = load_base_autoencoder(
            settings.models.autoencoder, settings.project.seed, context.root
        )
    except (ValueError, WeightsMissing) as problem:
        raise StageFailed(f"latents: {problem}") from problem
    if not items:
        raise StageFailed(
            "latents: the slices are empty; relax the rules in `select` or add photos"
        )
    try:
        with deterministic_torch(settings.runtime.torch_threads):
            store = encode_corpus(
                items,
                autoencoder,
                settings.latents,
                work_dir=context.state_dir / "encoding",
                destination=context.output_dir,
                device=settings.runtime.device,
                max_megapixels=settings.ingest.max_megapixels,
                workers=_workers(context, encoder_digest(autoencoder)),
            )
    except (ValueError, WorkersDoNotStart) as problem:
        raise StageFailed(f"latents: {problem}") from problem
    bands = band_energy_shares(store)
    return _describe(context.output_dir, store, bands)


def _workers(context: StageContext, digest: str) -> Workers | None:
    """Encoders elsewhere, where the settings want them."""
    settings = context.settings
    limits = encoder_limits(settings, settings.models.autoencoder.pretrained)
    if limits is None:
        return None
    job = LatentJob(
        autoencoder=settings.models.autoencoder,
        seed=settings.project.seed,
        root=str(context.root),
        digest=digest,
        dtype=settings.latents.dtype,
        max_megapixels=settings.ingest.max_megapixels,
        placement=Placement.of(settings, context.state_dir),
    )
    return latent_workers(job, limits)


def _describe(folder: Path, store: LatentStore, bands: pd.DataFrame) -> StageResult:
    summary = _summary(store, bands)
    text = json.dumps(summary, indent=2, sort_keys=True) + "\n"
    write_text(folder / "summary.json", text)
    write_text(folder / "bands.csv", bands.to_csv(index=False, lineterminator="\n"))
    _draw_bands(bands, folder / "bands.png")
    return StageResult(
        metrics={name: float(v) for name, v in summary.items() if isinstance(v, (int, float))},
        artifacts=(folder / "bands.png", folder / "summary.json"),
        datasets={"latents": folder / "index.parquet"},
        tags={"latents.digest": store.digest, "latents.encoder": summary["encoder_digest"]},
        summary=(
            f"{len(store)} latents in {summary['buckets']} buckets, {summary['mib']:.2f} MiB, "
            f"mean {summary['latent_mean']:+.2f}, spread {summary['latent_std']:.2f}"
        ),
    )


def _summary(store: LatentStore, bands: pd.DataFrame) -> dict[str, Any]:
    """Counts, size, digests, and mean and spread over all latent values (float64)."""
    index = store.index
    count, total, squares = 0, 0.0, 0.0
    for image_id in index["image_id"]:
        latent = store.read(image_id).double()
        count += latent.numel()
        total += float(latent.sum())
        squares += float(latent.square().sum())
    mean = total / count
    shares = {f"{name}_energy_share": float(bands[name].mean()) for name in BAND_NAMES}
    return {
        "images": len(index),
        "rejected_images": len(store.rejected),
        "train_images": int((index["split"] == "train").sum()),
        "eval_images": int((index["split"] == "eval").sum()),
        "buckets": int(index["bucket"].nunique()),
        "shards": int(index["shard"].nunique()),
        "mib": float(index["nbytes"].sum()) / 2**20,
        "latent_mean": mean,
        "latent_std": max(squares / count - mean**2, 0.0) ** 0.5,
        "digest": store.digest,
        "encoder_digest": str(index["encoder_digest"].iloc[0]),
        **shares,
    }


def _draw_bands(bands: pd.DataFrame, path: Path) -> None:
    """Energy shares of the Haar bands, every image as a point and the mean as a bar (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    # The canvas of the figure itself: pyplot would pick a backend for the whole process.
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    positions = range(len(BAND_NAMES))
    axes.bar(positions, [bands[name].mean() for name in BAND_NAMES], color="lightsteelblue")
    for position, name in zip(positions, BAND_NAMES, strict=True):
        axes.plot([position] * len(bands), bands[name], ".", color="black", markersize=4)
    # White noise has a quarter of its energy in every band.
    axes.axhline(0.25, linestyle="--", linewidth=0.8, color="gray", label="white noise")
    axes.set_xticks(list(positions), [name.upper() for name in BAND_NAMES])
    axes.set(title="Haar band energy of the latents", ylabel="share of energy", ylim=(0, 1))
    axes.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
