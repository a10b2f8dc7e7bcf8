"""`ultraflux diagnose ...`: figures and numbers that show what the method does, and how well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.command_line import fail, project_root, refuse_no_store, refusing
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from components.settings.schema import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="Figures (PNG, SVG) and numbers (JSON) on RoPE, latents and the objective.",
)
Output = Annotated[Path, typer.Option(help="Folder for figures and numbers.")]
_FOLDER = Path("outputs/diagnose")


def _settings(root: Path) -> Settings:
    from components.settings.schema import SettingsError, load_settings

    with refusing(SettingsError):
        return load_settings(root / "params.yaml")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    terminal().print(table_of(columns, rows, title=title, left=(0,)))


def _save(output: Path, name: str, figures: dict[str, Any], numbers: dict[str, Any]) -> None:
    from components.diagnostics.figures import save_figure, save_numbers

    try:
        written = [path for key, f in figures.items() for path in save_figure(f, output, key)]
        written.append(save_numbers(numbers, output, name))
    except OSError as problem:
        raise fail(f"--output {output}: {problem.strerror or problem}") from None
    for path in written:
        print(path)


@app.command()
def rope(
    tokens: Annotated[
        int, typer.Option(min=1, help="Extent of the stretched axis in tokens (1 token: 32 px).")
    ] = 128,
    window: Annotated[int, typer.Option(min=2, help="Training window in tokens per axis.")] = 64,
    dim: Annotated[int, typer.Option(min=4, help="Rotary channels of the axis; Flux: 56.")] = 56,
    band: Annotated[
        int, typer.Option(min=0, help="Band drawn across aspect ratios, 0 the fastest.")
    ] = 4,
    output: Output = _FOLDER,
) -> None:
    """Cycles, phase closure and cosine patterns of all four RoPE variants.

    rope_bands: the supplement's figure 1. A band that makes a whole number of cycles in the
    training window closes: its phase-closure error is 0. The table counts closed bands and
    distinct frequencies; "slowest" is the least frequency relative to plain RoPE.
    rope_patterns: figure 2, one band drawn over the image for several aspect ratios.
    rope.json holds every number behind them.

    Example: ultraflux diagnose rope --tokens 170   (a 5440 px edge)
    """
    from components.diagnostics import rope as diagnostics

    if band >= dim // 2:
        raise fail(f"--band {band}: {dim} channels have bands 0 to {dim // 2 - 1}")
    theta = 10000.0
    with refusing(ValueError):
        numbers = diagnostics.rope_numbers(dim=dim, window=window, tokens=tokens, theta=theta)
    pattern = {"band": band, "dim": dim, "window": window, "theta": theta}
    numbers["patterns"] = diagnostics.pattern_numbers(**pattern)  # type: ignore[arg-type]
    _table(
        f"RoPE, window {window} tokens, used at {tokens} tokens",
        (
            "variant",
            "closed",
            "worst rad",
            "mean rad",
            "distinct",
            "slowest",
            "ampl.",
        ),
        diagnostics.rope_rows(numbers),
    )
    figures = {
        "rope_bands": diagnostics.bands_figure(numbers),
        "rope_patterns": diagnostics.patterns_figure(**pattern),  # type: ignore[arg-type]
    }
    _save(output, "rope", figures, numbers)


@app.command()
def wavelet(
    store: Annotated[
        Path | None, typer.Option(help="Latent store; default: data/latents of the last run.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Instead: a folder of images, encoded here.")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="VAE folder for --images; default: params.yaml's.")
    ] = None,
    output: Output = _FOLDER,
) -> None:
    """Histograms and energy shares of the latents' Haar bands (the supplement's figure 3).

    Heavy tails in LH, HL and HH are what the SNR-aware Huber objective is made for. In the paper
    LL holds 87.4% of the energy of 400 4K images.

    Example: ultraflux diagnose wavelet --images data/sample
    """
    root = project_root()
    if store and images:
        raise fail("--store and --images: give one of them")
    if vae and not images:
        raise fail("--vae: only with --images; a store holds latents already")
    if not images:
        otherwise = "run the stage `latents` first, or name a folder with --images"
        refuse_no_store(store or root / "data" / "latents", otherwise)
    from components.diagnostics import wavelet as diagnostics
    from components.files.weight_folders import WeightsMissing
    from components.images.decoding import ImageUndecodable
    from components.training.stores.latent_store import (
        LatentCorrupt,
        LatentStore,
        LatentStoreIncomplete,
    )

    try:
        if images:
            latents, source = _encoded(root, images, vae)
        else:
            opened = LatentStore(store or root / "data" / "latents")
            latents = (opened.read(str(name)) for name in opened.index["image_id"])
            source = f"store {opened.digest[:12]}"
        numbers = {**diagnostics.wavelet_numbers(latents), "source": source}
    except LatentStoreIncomplete as problem:
        raise fail(f"{problem}, or name a folder with --images") from None
    except (ValueError, ImageUndecodable, WeightsMissing, LatentCorrupt) as problem:
        raise fail(str(problem)) from None
    columns = ("band", "energy", "mean energy", "|w|>0.5", "|w|>1", "max |w|", "ex. kurtosis")
    rows = diagnostics.wavelet_rows(numbers)
    _table(f"Haar bands of {numbers['images']} latents", columns, rows)
    _save(output, "wavelet", {"wavelet": diagnostics.wavelet_figure(numbers)}, numbers)


def _encoded(root: Path, images: Path, vae: Path | None) -> tuple[Any, str]:
    """(latents of the folder's images, what they came from)."""
    from components.diagnostics.wavelet import latents_of_images
    from components.images.aspect_buckets import buckets
    from components.models.loading.base_autoencoder import encoder_digest, load_base_autoencoder

    settings = _settings(root)
    if not images.is_dir():
        raise ValueError(f"--images {images}: not a folder")
    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in settings.ingest.extensions)
    if not paths:
        known = ", ".join(settings.ingest.extensions)
        raise ValueError(f"--images {images}: no image in it ({known})")
    chosen = settings.models.autoencoder
    if vae:
        chosen = chosen.model_copy(update={"pretrained": str(vae.absolute())})
    autoencoder = load_base_autoencoder(chosen, settings.project.seed, root)
    return (
        latents_of_images(paths, autoencoder, buckets(settings.buckets)),
        f"encoder {encoder_digest(autoencoder)[:12]}",
    )


@app.command()
def objective(output: Output = _FOLDER) -> None:
    """Threshold c(t), weight omega(t) and effective weight of SNR-HW, from params.yaml.

    The last panel divides the loss of a velocity error by its square: flow matching is 1
    everywhere. Large errors fall below the small ones: that is the Huber part.

    Example: ultraflux diagnose objective
    """
    from components.diagnostics import objective as diagnostics

    chosen = _settings(project_root()).objective.snr_huber
    numbers = diagnostics.objective_numbers(chosen)
    errors = [f"error {error:g}" for error in diagnostics.ERRORS]
    _table(
        f"SNR-HW, time weight {chosen.time_weight}",
        ("t", "c", "omega paper", "omega fm_exact", *errors),
        diagnostics.objective_rows(numbers),
    )
    _save(output, "objective", {"objective": diagnostics.objective_figure(numbers)}, numbers)
