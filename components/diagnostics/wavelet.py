"""Haar statistics of latents: energy shares and tails per band (UltraFlux, supplement 4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.files.figures import BLUE, GREEN, ORANGE, RED, new_figure
from components.objectives.haar import BAND_NAMES, haar

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from components.images.aspect_buckets import Bucket
    from components.models.autoencoder_f16 import AutoencoderKLF16

BINS = 120
BIN_WIDTH = 0.1
"""Histogram of |coefficient| in fixed steps up to 12, the rest in the last bin: a second corpus
can be laid over the first."""
TAILS = (0.5, 1.0)
"""Thresholds whose exceedance the supplement states."""
PUBLISHED_LL_SHARE = 0.874
"""Of 400 images of MultiAspect-4K-1M under the released F16 autoencoder."""
_COLOURS = (BLUE, ORANGE, GREEN, RED)


def wavelet_numbers(latents: Iterable[Tensor]) -> dict[str, Any]:
    """Pooled statistics of the one-level orthonormal Haar bands.

    Args:
        latents: (C, h, w) each, normalised; even h and w, sizes may differ.

    Returns:
        `images`, `bin_width` and `bands`: per band `energy_share`, `mean_energy`, `share_above`
        (by threshold), `max_abs`, `excess_kurtosis`, `coefficients`, `histogram` (counts).

    Raises:
        ValueError: there are no latents, or one of them holds a NaN or infinity.
    """
    images = 0
    moments = {name: np.zeros(4) for name in BAND_NAMES}  # count, sum, sum^2, sum^4
    above = {name: dict.fromkeys(TAILS, 0) for name in BAND_NAMES}
    largest = dict.fromkeys(BAND_NAMES, 0.0)
    histograms = {name: np.zeros(BINS, dtype=np.int64) for name in BAND_NAMES}
    for latent in latents:
        images += 1
        for name, band in zip(BAND_NAMES, haar(latent.double()), strict=True):
            values = band.flatten().numpy()
            if not np.isfinite(values).all():
                raise ValueError(f"latent {images}: not finite; encode again")
            square = values**2
            moments[name] += (len(values), values.sum(), square.sum(), (square**2).sum())
            size = np.abs(values)
            largest[name] = max(largest[name], float(size.max()))
            for tail in TAILS:
                above[name][tail] += int((size > tail).sum())
            index = np.minimum((size / BIN_WIDTH).astype(np.int64), BINS - 1)
            histograms[name] += np.bincount(index, minlength=BINS)
    if not images:
        raise ValueError("no latents to describe; run the stage `latents`, or name images")
    total = sum(m[2] for m in moments.values()) or 1.0
    bands = {}
    for name, (count, _, energy, fourth) in moments.items():
        mean_energy = energy / count
        bands[name] = {
            "coefficients": int(count),
            "energy_share": energy / total,
            "mean_energy": mean_energy,
            "share_above": {str(tail): n / count for tail, n in above[name].items()},
            "max_abs": largest[name],
            # About zero, not about the mean: a band's offset is energy too.
            "excess_kurtosis": fourth / count / mean_energy**2 - 3.0 if energy else 0.0,
            "histogram": histograms[name].tolist(),
        }
    return {"images": images, "bin_width": BIN_WIDTH, "bands": bands}


def wavelet_rows(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a band for a table."""
    return [
        (
            name.upper(),
            f"{band['energy_share']:.1%}",
            f"{band['mean_energy']:.3f}",
            *(f"{band['share_above'][str(tail)]:.1%}" for tail in TAILS),
            f"{band['max_abs']:.2f}",
            f"{band['excess_kurtosis']:+.2f}",
        )
        for name, band in numbers["bands"].items()
    ]


def wavelet_figure(numbers: dict[str, Any]) -> Figure:
    """Supplement figure 3: log-count histograms of |coefficient| per band, and energy shares."""
    figure = new_figure(12, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    edges = np.arange(BINS + 1) * numbers["bin_width"]
    for colour, (name, band) in zip(_COLOURS, numbers["bands"].items(), strict=True):
        counts = np.array(band["histogram"])
        label = f"{name.upper()}  ({band['energy_share']:.1%} of energy)"
        left.stairs(np.where(counts > 0, counts, np.nan), edges, color=colour, label=label, lw=1.4)
    last = max(int(np.flatnonzero(band["histogram"])[-1]) for band in numbers["bands"].values())
    left.set(
        yscale="log",
        xlim=(0, edges[min(last + 2, BINS)]),
        xlabel="|Haar coefficient| of normalised latents",
        ylabel=f"count per {numbers['bin_width']:g} (log)",
        title=f"Latents of {numbers['images']} images",
    )
    left.legend()
    left.grid(alpha=0.25)
    shares = [band["energy_share"] for band in numbers["bands"].values()]
    names = [name.upper() for name in numbers["bands"]]
    bars = right.bar(names, shares, color=_COLOURS)
    right.bar_label(bars, [f"{share:.1%}" for share in shares])
    right.axhline(
        PUBLISHED_LL_SHARE, color="black", lw=0.9, ls="--", label="LL in the paper, 87.4%"
    )
    right.axhline(0.25, color="gray", lw=0.9, ls=":", label="white noise, 25%")
    right.set(title="Energy share", ylabel="share of energy", ylim=(0, 1))
    right.legend(fontsize=9, loc="center right")
    return figure


def latents_of_images(
    paths: Sequence[Path], autoencoder: AutoencoderKLF16, buckets: Sequence[Bucket]
) -> Iterator[Tensor]:
    """Normalised latents (C, h, w) of photographs, each fitted to its nearest bucket.

    Raises:
        ImageUndecodable: a file cannot be read; the message names it.
    """
    from components.images.aspect_buckets import nearest_bucket
    from components.images.decoding import read_rgb
    from components.training.encoding.latents import EncodingItem, encode, load_image

    for path in paths:
        height, width = read_rgb(path).pixels.shape[:2]
        item = EncodingItem(path.stem, "diagnosed", path, nearest_bucket(height, width, buckets))
        yield encode(autoencoder, load_image(item)[None])[0]
