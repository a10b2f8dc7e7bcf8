"""What a latent store holds, in numbers and in one figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from components.files.figures import new_figure, save_png
from components.files.whole_files import write_text
from components.objectives.haar import BAND_NAMES, haar
from components.training.stores.latent_store import LatentStore


def band_energy_shares(store: LatentStore) -> pd.DataFrame:
    """Share of each Haar band in the energy of every latent.

    Returns:
        Columns image_id, split, bucket, ll, lh, hl, hh; shares in [0, 1] that sum to 1 a row.
    """
    rows = []
    for row in store.index.itertuples(index=False):
        # The transform is orthonormal, so the four energies add up to the latent's own.
        # In float64: squares of hundreds of thousands of values are added.
        energies = [float(b.double().square().sum()) for b in haar(store.read(str(row.image_id)))]
        # A latent of zeros has shares of zero instead of a division by zero.
        total = sum(energies) or 1.0
        shares = {name: e / total for name, e in zip(BAND_NAMES, energies, strict=True)}
        rows.append({"image_id": row.image_id, "split": row.split, "bucket": row.bucket, **shares})
    return pd.DataFrame(rows, columns=["image_id", "split", "bucket", *BAND_NAMES])


def write_summary(store: LatentStore, folder: Path) -> dict[str, Any]:
    """Write `summary.json`, `bands.csv` and `bands.png`; returns what the first one says."""
    bands = band_energy_shares(store)
    summary = summarise(store, bands)
    text = json.dumps(summary, indent=2, sort_keys=True) + "\n"
    write_text(folder / "summary.json", text)
    write_text(folder / "bands.csv", bands.to_csv(index=False, lineterminator="\n"))
    draw_bands(bands, folder / "bands.png")
    return summary


def summarise(store: LatentStore, bands: pd.DataFrame) -> dict[str, Any]:
    """Counts, size, digests, and mean and spread over all latent values (float64).

    Args:
        store: not empty.
        bands: its `band_energy_shares`.
    """
    index = store.index
    # One latent in memory at a time: a corpus of a million is 2 TB of them.
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
        # Rounding can leave a difference just below zero where all values are equal.
        "latent_std": max(squares / count - mean**2, 0.0) ** 0.5,
        "digest": store.digest,
        "encoder_digest": str(index["encoder_digest"].iloc[0]),
        **shares,
    }


def draw_bands(bands: pd.DataFrame, path: Path) -> None:
    """Energy shares of the Haar bands, every image as a point and the mean as a bar (PNG)."""
    figure = new_figure(5.5, 3.6)
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
    save_png(figure, path)
