"""Line charts as inline SVG: deterministic text, colours from CSS variables of the page.

Written here, and not with a plotting library, because a chart then follows the page's light or
dark theme, weighs a few KB and is the same bytes on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44
_COLOURS = 8
_LETTER_PX, _LEGEND_MARK = 8.5, 34
"""Width of a letter of 12 px at most, and of the mark and the gaps around a name in a legend."""
"""Number of `--series-N` variables that the page defines."""
_SMALLEST, _LARGEST = 1e-250, 1e250
"""Beyond these magnitudes an axis and its margins would leave the range of a float."""


@dataclass(frozen=True)
class Series:
    """One line: points in increasing x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    """Drawn pale, such as single steps behind their average."""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 between them, or evenly spaced, where the range is short."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(inside) >= 3:
        return inside
    finer = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return finer if len(finer) >= 3 else nice_ticks(low, high, 4)


def _label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _bounds(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        margin = 10.0 ** (0.04 * (math.log10(high) - math.log10(low))) if high > low else 1.1
        return low / margin, high * margin
    margin = 0.05 * (high - low) or max(abs(high) * 0.05, 1e-6)
    return low - margin, high + margin


def _plottable(series: Series, *, log: bool) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for x, y in zip(series.x, series.y, strict=True)
        if abs(y) <= _LARGEST and (y >= _SMALLEST or not log)
    ]


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, log_y: bool = False) -> str:
    """An SVG element with one line per series, axes, ticks and a legend.

    Args:
        series: lines; values that are not finite (or not positive on a log axis), or of a
            magnitude that no axis can hold, are left out.
        x_label: name and unit of x.
        y_label: name and unit of y.
        log_y: logarithmic y axis.

    Returns:
        `<svg ...>...</svg>`, all names escaped; an empty string when there is nothing to draw.
    """
    lines = [(s, _plottable(s, log=log_y)) for s in series]
    lines = [(line, points) for line, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1.0
    y_low, y_high = _bounds(ys, log=log_y)
    plot_w, plot_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    places = _legend([line.name for line, _ in lines], plot_w) if len(lines) > 1 else []
    height = _HEIGHT + (20 * (1 + places[-1][1]) if places else 0)

    def at_x(x: float) -> float:
        return _LEFT + plot_w * (x - x_low) / (x_high - x_low)

    def at_y(y: float) -> float:
        if log_y:
            share = (math.log(y) - math.log(y_low)) / (math.log(y_high) - math.log(y_low))
        else:
            share = (y - y_low) / (y_high - y_low)
        return _TOP + plot_h * (1.0 - share)

    out = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(y_label)} over {escape(x_label)}">'
    ]
    for tick in _log_ticks(y_low, y_high) if log_y else nice_ticks(y_low, y_high):
        y = at_y(tick)
        out.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in nice_ticks(x_low, x_high, 6):
        x = at_x(tick)
        out.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
            f"{_label(tick)}</text>"
        )
    base = _HEIGHT - _BOTTOM
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for index, (line, points) in enumerate(lines):
        name, opacity = line.name, ' opacity="0.4"' if line.faint else ""
        colour = f"var(--series-{index % _COLOURS})"
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        if len(points) == 1:
            x, y = points[0]
            out.append(f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="{colour}"/>')
        else:
            out.append(
                f'<polyline points="{path}" stroke="{colour}"{opacity}>'
                f"<title>{escape(name)}</title></polyline>"
            )
        if places:
            x0, y0 = _LEFT + places[index][0], _HEIGHT + 12 + 18 * places[index][1]
            out.append(
                f'<rect x="{x0:.1f}" y="{y0 - 8}" width="12" height="4" fill="{colour}"{opacity}/>'
            )
            out.append(f'<text x="{x0 + 17:.1f}" y="{y0}">{escape(name)}</text>')
    middle = _TOP + plot_h / 2
    out.append(
        f'<text x="{_LEFT + plot_w / 2:.1f}" y="{base + 35}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    out.append(
        f'<text x="14" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle:.1f})">{escape(y_label)}</text>'
    )
    out.append("</svg>")
    return "".join(out)


def _legend(names: Sequence[str], width: float) -> list[tuple[float, int]]:
    """(x, row) of each name: one behind the other, whole, a new row where the next is too long."""
    places: list[tuple[float, int]] = []
    x, row = 0.0, 0
    for name in names:
        taken = _LEGEND_MARK + _LETTER_PX * len(name)
        if x and x + taken > width:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += taken
    return places


_FOREST_PLOT, _FOREST_ROW, _FOREST_LABEL = 270, 22, 210
"""Widths of the plot and of the longest label, height of a row, in pixels."""


def forest_plot(rows: Sequence[tuple[str, float, float, float]], *, x_label: str) -> str:
    """Differences with their intervals, one row each, about a line at zero.

    Args:
        rows: (label, low, value, high), finite, in one unit.
        x_label: what is to the right of zero.

    Returns:
        SVG; empty without rows.
    """
    if not rows:
        return ""
    reach = max(max(abs(low), abs(high)) for _, low, _, high in rows) or 1.0
    label_px = min(_FOREST_LABEL, round(_LETTER_PX * max(len(label) for label, *_ in rows)))
    left = label_px + 10
    right = left + _FOREST_PLOT
    bottom = _FOREST_ROW * len(rows) + 8

    def x(value: float) -> float:
        return left + (value / reach + 1.0) / 2.0 * (right - left)

    parts = [
        # In pixels of its own: letters neither swell on a wide page nor shrink away on a phone.
        f'<svg viewBox="0 0 {right + 12} {bottom + 46}" width="{right + 12}" role="img" '
        f'aria-label="{escape(x_label)}">',
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{bottom}" stroke="currentColor" '
        'stroke-dasharray="3 3" opacity=".5"/>',
    ]
    for place, (label, low, value, high) in enumerate(rows):
        y = _FOREST_ROW * place + 16
        parts += [
            f'<text x="{label_px}" y="{y + 4}" text-anchor="end" font-size="12" '
            f'fill="currentColor">{escape(label)}</text>',
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" '
            'stroke="currentColor" stroke-width="2"/>',
            f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="currentColor"/>',
        ]
    what, bracket, unit = x_label.partition(" (")
    for line, text in enumerate(filter(None, (what, f"{bracket}{unit}".strip()))):
        parts.append(
            f'<text x="{(left + right) / 2:.1f}" y="{bottom + 20 + 16 * line}" '
            f'text-anchor="middle" font-size="12" fill="currentColor">{escape(text)}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)
