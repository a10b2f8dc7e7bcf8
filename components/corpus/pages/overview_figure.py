"""One figure of a corpus: which shapes it has, and where the two texture thresholds cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from components.files.figures import KEPT, REJECTED, new_figure, save_png
from components.settings.corpus import SelectSettings

_DPI = 110
_MAX_POINTS = 20_000


def save_overview(table: pd.DataFrame, settings: SelectSettings, path: Path) -> None:
    """Draw aspect ratios, and entropy against flatness with both thresholds, as a PNG.

    Args:
        table: manifest with aspect_ratio, flat_fraction, entropy_bits and kept.
        settings: where the thresholds are.
        path: PNG, replaced when complete; no date or version inside, so equal tables give equal
            bytes.
    """
    kept = table["kept"].eq(True).to_numpy()
    groups = ((kept, KEPT, "kept"), (~kept, REJECTED, "rejected"))
    figure = new_figure(10, 4.2, dpi=_DPI)
    shapes, texture = figure.subplots(1, 2)

    ratios = np.log2(table["aspect_ratio"].to_numpy(dtype=float))
    edges = np.arange(-2, 2.01, 0.25)
    shapes.hist(
        [np.clip(ratios[mask & np.isfinite(ratios)], -2, 2) for mask, _, _ in groups],
        bins=list(edges),
        stacked=True,
        color=[colour for _, colour, _ in groups],
        label=[label for _, _, label in groups],
    )
    shapes.set_xticks([-2, -1, 0, 1, 2], ["1:4", "1:2", "1:1", "2:1", "4:1"])
    shapes.set_xlabel("width : height")
    shapes.set_ylabel("images")
    shapes.legend(frameon=False)

    for mask, colour, label in groups:
        rows = table[mask]
        # Evenly spaced rows: a million points take minutes and show no more.
        rows = rows.iloc[:: max(1, -(-len(rows) // _MAX_POINTS))]
        texture.scatter(
            rows["flat_fraction"], rows["entropy_bits"], s=28, color=colour, label=label
        )
    texture.axvline(settings.max_flat_fraction, color="0.4", linewidth=1, linestyle="--")
    texture.axhline(settings.min_entropy_bits, color="0.4", linewidth=1, linestyle="--")
    texture.set_xlim(-0.02, 1.02)
    texture.set_xlabel("flat fraction")
    texture.set_ylabel("entropy (bits)")

    save_png(figure, path, dpi=_DPI)
