"""Charts drawn with matplotlib: one look, and the same bytes for the same numbers.

Matplotlib writes its version, the date and random ids into what it saves; a stage's outputs are
compared by their bytes, so all saving goes through here. Lines in a page that follows the reader's
light or dark theme are drawn by `components.evaluation.pages.charts` instead.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 110
BLUE, ORANGE, GREEN, PURPLE, RED = "#4c72b0", "#dd8452", "#55a868", "#8172b3", "#c44e52"
"""Of curves; told apart with the common colour-vision deficiencies, also by their lightness."""
KEPT, REJECTED = "#1b7f5c", "#b3423a"
GROUPS = (KEPT, REJECTED, "#3f6fb5", "#9a6b00")
"""Of parts of a corpus, in order."""


def new_figure(width_in: float, height_in: float, *, dpi: float | None = None) -> Figure:
    """An empty figure that needs no display.

    Args:
        width_in: inches.
        height_in: inches.
        dpi: of the layout; None: matplotlib's own.
    """
    # Here, because matplotlib takes a second to import and most runs of a command draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=dpi, layout="constrained")
    # A canvas of its own: pyplot would pick a backend for the whole process and keep the figure.
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path, *, dpi: float = PNG_DPI, signed: bool = False) -> None:
    """Write a PNG whole or not at all.

    Args:
        figure: drawn.
        path: of the file.
        dpi: pixels per inch.
        signed: leave matplotlib's name and version in the file. For files whose bytes are known to
            stores already; a new version of matplotlib then makes other bytes of the same pixels.
    """
    metadata = None if signed else {"Software": None}
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata=metadata)


def save_png_and_svg(figure: Figure, folder: Path, name: str, *, dpi: float) -> tuple[Path, Path]:
    """Write `name.png` and `name.svg`, letters as outlines so that they look alike everywhere.

    Args:
        figure: drawn.
        folder: is made.
        name: of the files, and of the ids inside the SVG.
        dpi: of the PNG.

    Returns:
        (PNG, SVG).
    """
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    with _fixed_ids(name, {"font.size": 10}):
        save_png(figure, png, dpi=dpi)
        with whole_file(svg) as temporary:
            figure.savefig(temporary, format="svg", dpi=dpi, metadata={"Date": None})
    return png, svg


def inline_svg(figure: Figure, salt: str) -> str:
    """`<svg ...>...</svg>` to stand inside a page, letters as text in the page's own fonts.

    Args:
        figure: drawn.
        salt: names the ids inside; different figures of one page need different ones.
    """
    buffer = io.StringIO()
    with _fixed_ids(salt, {"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # What stands before is an XML declaration, which HTML does not allow in its middle.
    return text[text.index("<svg") :]


def _fixed_ids(salt: str, settings: dict[str, Any]) -> Any:
    """Clip paths and markers are named by hashes with this salt; without one it is random."""
    import matplotlib as mpl

    return mpl.rc_context({"svg.hashsalt": salt} | settings)
