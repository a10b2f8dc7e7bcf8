"""Where diagnostic figures and numbers go: PNG, SVG and JSON with the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.whole_files import whole_file, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 130
COLOURS = {
    "flux": "#4c72b0",
    "official": "#dd8452",
    "official_prefix": "#8172b3",
    "paper": "#55a868",
}
"""One colour per RoPE variant, readable with the common colour-vision deficiencies."""


def save_figure(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name.png` and `name.svg`, without dates or random ids in them.

    Returns:
        (PNG, SVG).
    """
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f"{name}.png", folder / f"{name}.svg")
    metadata: tuple[dict[str, Any], ...] = ({"Software": None}, {"Date": None})
    # The salt names clip paths and markers; without one they are random.
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 10}):
        for path, extra in zip(paths, metadata, strict=True):
            with whole_file(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:], dpi=PNG_DPI, metadata=extra)
    return paths


def save_numbers(numbers: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Write `name.json` with sorted keys."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(numbers, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_text(path, text)
    return path
