"""What a VAE training run leaves behind: the autoencoder, tables, crops and a figure.

Everything depends on inputs and settings only; durations stay in the metric log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from components.files.figures import new_figure, save_png
from components.files.safetensors_header import SPEC, describe_file
from components.files.weight_folders import weights_checksums, weights_identity
from components.files.whole_files import whole_file, whole_folder, write_text
from components.images.arrays import ImageArray
from components.metrics.native.fidelity import ssim
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.training.vae.tile_store import count_left_out
from components.training.vae.tiles import LeftOut
from components.training.vae.trainer import VaeTraining, mean_psnr_db

KINDS = ("original", "before", "after")
GRID_CROPS = 12
_GAP_PX = 4
_WHITE = 255


def history_table(history: Sequence[dict[str, float]]) -> pd.DataFrame:
    """Columns step, loss, loss_<term>..., grad_norm, psnr_db; NaN where not measured."""
    # A dictionary per step, in which PSNR stands only where it was measured.
    table = pd.DataFrame(history)
    terms = sorted(name for name in table.columns if name.startswith("loss_"))
    # Named one by one: durations and whatever else a history may get stay out of the file.
    columns = ["step", "loss", *terms, "grad_norm", "psnr_db"]
    return table.reindex(columns=columns).astype({"step": "int64"})


def headline_metrics(training: VaeTraining) -> dict[str, float]:
    """PSNR and SSIM on the held-out crops before and after, and the first and last loss.

    PSNR in dB and SSIM are means over crops; losses are means over a tenth of the steps.
    """
    crops, before, after = training.held_out, training.before, training.after

    def mean_ssim(images: Sequence[ImageArray]) -> float:
        return float(np.mean([ssim(x, y) for x, y in zip(crops, images, strict=True)]))

    psnr_before, psnr_after = mean_psnr_db(crops, before), mean_psnr_db(crops, after)
    losses = [row["loss"] for row in training.history if "loss" in row]
    # Single steps scatter with their crops.
    tenth = max(1, len(losses) // 10)
    return {
        "psnr_before_db": psnr_before,
        "psnr_after_db": psnr_after,
        "psnr_gain_db": psnr_after - psnr_before,
        "ssim_before": mean_ssim(before),
        "ssim_after": mean_ssim(after),
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
    }


def autoencoder_about(pretrained: Path | None, seed: int, crop_px: int) -> dict[str, str]:
    """Metadata of the trained autoencoder's file.

    Args:
        pretrained: folder that training started from; None: random weights.
        seed: of the random ones.
        crop_px: edge of the crops that it was trained on.
    """
    about = {
        **SPEC,
        "modelspec.architecture": "flux-1/vae",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "UltraFlux autoencoder, decoder trained",
        # Of the encoder that it came with; the settings say none.
        "modelspec.license": "unknown",
        "modelspec.tags": "ultraflux, vae",
        "modelspec.resolution": f"{crop_px}x{crop_px}",
    }
    if pretrained is None:
        return about | {"ultraflux.base": f"the random weights of seed {seed}"}
    return about | {
        # Not where it lies on this machine.
        "ultraflux.base": "/".join(pretrained.parts[-2:]),
        "ultraflux.base_sha256": weights_identity(weights_checksums(pretrained)),
    }


def left_out_table(left_out: Mapping[str, Sequence[LeftOut]]) -> pd.DataFrame:
    """Photographs without tiles, by slice: columns slice, image_id, name, kind, reason."""
    rows = [{"slice": name, **asdict(one)} for name, some in left_out.items() for one in some]
    return pd.DataFrame(rows, columns=["slice", "image_id", "name", "kind", "reason"])


def crop_grid(training: VaeTraining) -> ImageArray:
    """Original, before and after of the first crops, two crops to a row, uint8 (H, W, 3)."""
    kinds = (training.held_out, training.before, training.after)
    triples = [
        np.concatenate([_framed(image) for image in images], axis=1)
        for images in list(zip(*kinds, strict=True))[:GRID_CROPS]
    ]
    if len(triples) % 2:
        triples.append(np.full_like(triples[0], _WHITE))
    rows = [np.concatenate(pair, axis=1) for pair in zip(triples[0::2], triples[1::2], strict=True)]
    return np.concatenate(rows, axis=0)


def _framed(image: ImageArray) -> ImageArray:
    return np.pad(image, ((0, _GAP_PX), (0, _GAP_PX), (0, 0)), constant_values=_WHITE)


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Training loss (each step and rolling mean) and held-out PSNR, as a PNG."""
    figure = new_figure(9, 3.6)
    loss, psnr = figure.subplots(1, 2)
    loss.plot(table["step"], table["loss"], linewidth=0.6, alpha=0.5, label="step")
    smooth = table["loss"].rolling(max(1, len(table) // 20), min_periods=1).mean()
    loss.plot(table["step"], smooth, label="rolling mean")
    loss.set(title="training loss", xlabel="step", yscale="log")
    loss.legend()
    # PSNR is measured now and then; its gaps would break the line.
    measured = table.dropna(subset=["psnr_db"])
    psnr.plot(measured["step"], measured["psnr_db"], marker="o")
    psnr.set(title="PSNR on held-out crops", xlabel="step", ylabel="dB")
    save_png(figure, path)


def export_training(
    autoencoder: AutoencoderKLF16,
    training: VaeTraining,
    folder: Path,
    left_out: Mapping[str, Sequence[LeftOut]] | None = None,
    about: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Write everything into `folder`; returns the headline metrics.

    Files: `autoencoder/` (diffusers folder, safetensors), `history.csv`, `metrics.json`,
    `left_out.csv`, `crops/NN_{original,before,after}.png`, `crops.png`, `curves.png`.

    Args:
        autoencoder: as trained.
        training: what `train_vae` returned.
        folder: created when missing.
        left_out: photographs that were not used, by slice.
        about: metadata of the weights (`autoencoder_about`).
    """
    left_out = left_out or {}
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: `generate` must never load half an autoencoder.
    with whole_folder(folder / "autoencoder") as filled:
        autoencoder.save_pretrained(filled, safe_serialization=True)
        for file in filled.glob("*.safetensors"):
            describe_file(file, about or {})
    table = history_table(training.history)
    write_text(folder / "history.csv", table.to_csv(index=False, lineterminator="\n"))
    draw_curves(table, folder / "curves.png")
    missing = left_out_table(left_out).to_csv(index=False, lineterminator="\n")
    write_text(folder / "left_out.csv", missing)
    crops = zip(KINDS, (training.held_out, training.before, training.after), strict=True)
    # All crops or none: pictures of two runs side by side would be a false comparison.
    with whole_folder(folder / "crops") as filled:
        for kind, images in crops:
            for number, image in enumerate(images):
                Image.fromarray(image).save(filled / f"{number:02d}_{kind}.png")
    with whole_file(folder / "crops.png") as temporary:
        Image.fromarray(crop_grid(training)).save(temporary, format="PNG")
    metrics = headline_metrics(training)
    counts = count_left_out(one for some in left_out.values() for one in some)
    metrics |= {f"left_out_{kind}": float(count) for kind, count in counts.items()}
    # Sorted and ended by a newline: the file is hashed, and read by people.
    text = json.dumps(metrics, indent=2, sort_keys=True) + "\n"
    write_text(folder / "metrics.json", text)
    return metrics
