"""Figures and pages of corpus reports: inline SVG with equal bytes for equal data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from components.files.figures import GROUPS, inline_svg, new_figure
from components.files.page_templates import page_templates
from components.files.whole_files import write_text

_BINS = 40


def _svg(figure: Any, salt: str) -> Markup:
    return Markup(inline_svg(figure, salt))


def _axes() -> tuple[Any, Any]:
    figure = new_figure(5.2, 2.9)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def histogram(
    groups: Sequence[tuple[str, np.ndarray]], label: str, *, logarithmic: bool = False
) -> Markup:
    """Shares of values per group as outlines over common bins; empty without finite values.

    Args:
        groups: name and (N,) float values, not finite ones left out.
        label: name and unit of the axis.
        logarithmic: bins on log2, ticks in plain numbers.
    """
    found = []
    for name, values in groups:
        values = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
        if len(values):
            found.append((name, np.log2(values) if logarithmic else values))
    if not found:
        return Markup("")
    low = min(float(values.min()) for _, values in found)
    high = max(float(values.max()) for _, values in found)
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    figure, axes = _axes()
    for (name, values), colour in zip(found, GROUPS, strict=False):
        shares = np.histogram(values, edges)[0] / len(values)
        axes.stairs(shares, edges, label=name, color=colour, fill=len(found) == 1)
    if logarithmic:
        axes.xaxis.set_major_formatter(lambda x, _: f"{2.0**x:.2g}")
    axes.set_xlabel(label)
    axes.set_ylabel("share of images")
    if len(found) > 1:
        axes.legend(frameon=False)
    return _svg(figure, label)


def bars(counts: Sequence[tuple[str, float]], label: str) -> Markup:
    """Horizontal bars, the first on top; empty without any."""
    if not counts:
        return Markup("")
    figure, axes = _axes()
    figure.set_size_inches(5.2, 0.9 + 0.27 * len(counts))
    names = [name.replace("$", r"\$") for name, _ in counts]
    axes.barh(range(len(counts)), [value for _, value in counts], color=GROUPS[0])
    axes.set_yticks(range(len(counts)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return _svg(figure, label)


def render(template: str, **values: Any) -> str:
    """A self-contained page from a template beside this module; text is escaped."""
    templates = page_templates(Path(__file__).parent / "templates")
    return templates.get_template(template).render(**values)


def write_page(text: str, path: Path, *, follow: bool = False) -> None:
    """Write a page whole or not at all.

    Args:
        text: of the page.
        path: its folder is made.
        follow: see `whole_file`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text, follow=follow)
