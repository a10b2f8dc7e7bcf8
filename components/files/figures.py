"""Figures as PNG files: drawn without a display, whole on the disk or not there at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from components.files.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 110


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure with a canvas of its own: pyplot would pick a backend for the process."""
    # Here, because matplotlib takes a second to import and most runs of a command draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Make or replace `path`; equal figures give equal bytes."""
    with whole_file(path) as temporary:
        # matplotlib would write its version into the file, and a new one would change the bytes.
        figure.savefig(temporary, dpi=PNG_DPI, format="png", metadata={"Software": None})
