"""Where diagnostic figures and numbers go: PNG, SVG and JSON with the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.figures import BLUE, GREEN, ORANGE, PURPLE, save_png_and_svg
from components.files.whole_files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 130
COLOURS = {"flux": BLUE, "official": ORANGE, "official_prefix": PURPLE, "paper": GREEN}
"""One colour per RoPE variant."""


def save_figure(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name.png` and `name.svg`; returns both paths."""
    return save_png_and_svg(figure, folder, name, dpi=PNG_DPI)


def save_numbers(numbers: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Write `name.json` with sorted keys."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(numbers, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_text(path, text)
    return path
