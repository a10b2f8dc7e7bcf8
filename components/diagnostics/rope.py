"""RoPE diagnostics: cycles, phase closure and image-plane patterns (UltraFlux, supplement 3).

Per band k of one axis: r_k = L w_k / 2 pi cycles in the training window of L tokens. A whole number
closes: the phase at position L equals the phase at 0. Closure is a property of the snapped spectrum
before YaRN stretches it; the stretched one is measured beside it, because that is what runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from components.diagnostics.figures import COLOURS
from components.files.figures import new_figure
from components.models.resonance_rope import (
    ROPE_VARIANTS,
    FloatArray,
    axis_spectrum,
    snapped_frequencies,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATTERN_GRIDS = ((64, 64), (128, 64), (64, 128), (128, 32))
"""(tokens_h, tokens_w) of the supplement's figure 2; the first is the training grid."""


def wrapped(phase: FloatArray) -> FloatArray:
    """Angles moved to [-pi, pi)."""
    return np.asarray((phase + math.pi) % (2 * math.pi) - math.pi)


def rope_numbers(*, dim: int, window: int, tokens: int, theta: float) -> dict[str, Any]:
    """Band by band what each variant does to one axis.

    Args:
        dim: rotary channels of the axis.
        window: training window L in tokens.
        tokens: extent L' of the stretched axis.
        theta: rotary base.

    Returns:
        `dim`, `window`, `tokens`, `theta` and `variants`: for each variant lists over bands of
        `cycles` (snapped, in the window), `closure_error_rad` (snapped, at position L),
        `stretched_cycles` and `stretched_closure_error_rad` (as used for L' tokens),
        `stretch` (stretched over plain frequency), and `amplitude`, `distinct_frequencies`.
    """
    plain = snapped_frequencies(dim, window=window, theta=theta, variant="flux")
    variants = {}
    for variant in ROPE_VARIANTS:
        snapped = snapped_frequencies(dim, window=window, theta=theta, variant=variant)
        used, amplitude = axis_spectrum(tokens, dim, window=window, theta=theta, variant=variant)
        variants[variant] = {
            "cycles": (window * snapped / (2 * math.pi)).tolist(),
            "closure_error_rad": np.abs(wrapped(window * snapped)).tolist(),
            "stretched_cycles": (window * used / (2 * math.pi)).tolist(),
            "stretched_closure_error_rad": np.abs(wrapped(window * used)).tolist(),
            "stretch": (used / plain).tolist(),
            "amplitude": amplitude,
            # Frequencies that differ by rounding only are one.
            "distinct_frequencies": len(set(np.round(used, 12).tolist())),
        }
    return {"dim": dim, "window": window, "tokens": tokens, "theta": theta, "variants": variants}


def rope_rows(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a variant for a table: worst and mean closure error, amplitude, and so on."""
    rows: list[tuple[str, ...]] = []
    for name, values in numbers["variants"].items():
        closure = np.array(values["closure_error_rad"])
        rows.append(
            (
                name,
                f"{int((closure < 1e-9).sum())} of {len(closure)}",
                f"{closure.max():.3f}",
                f"{closure.mean():.3f}",
                str(values["distinct_frequencies"]),
                f"{min(values['stretch']):.3f}",
                f"{values['amplitude']:.4f}",
            )
        )
    return rows


def bands_figure(numbers: dict[str, Any]) -> Figure:
    """Supplement figure 1 for every variant: cycles, closure, stretch, and phase difference."""
    dim, window, tokens = numbers["dim"], numbers["window"], numbers["tokens"]
    bands = np.arange(dim // 2)
    figure = new_figure(13, 7.6)
    axes = figure.subplots(2, 3)
    styles = {"flux": "o-", "official": "s-", "official_prefix": "^-", "paper": "D-"}
    panels = (
        ("cycles", f"(a) Cycles in the {window}-token window", "cycles (log)"),
        ("closure_error_rad", f"(b) Phase-closure error at position {window}", "|phase| (rad)"),
        ("stretch", f"(c) Frequency used at {tokens} tokens", "relative to plain (log)"),
    )
    for axis, (key, title, label) in zip(axes[0], panels, strict=True):
        for name, values in numbers["variants"].items():
            axis.plot(
                bands,
                values[key],
                styles[name],
                color=COLOURS[name],
                label=name,
                markersize=4,
                linewidth=1,
                alpha=0.85,
            )
        axis.set(title=title, xlabel="band k (0 is fastest)", ylabel=label)
        axis.grid(alpha=0.25)
    for axis in (axes[0, 0], axes[0, 2]):
        axis.set_yscale("log")
    ticks = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    low, high = axes[0, 2].get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes[0, 2].set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes[0, 2].set_yticks([], minor=True)
    axes[0, 0].axhline(1, color="gray", linewidth=0.8, linestyle="--")
    axes[0, 1].legend(loc="upper right", fontsize=9)
    _difference_panels(figure, axes[1], numbers)
    return figure


def _difference_panels(figure: Figure, axes: Any, numbers: dict[str, Any]) -> None:
    """|wrap(p w - p w_snapped)| over band and position, p up to the stretched extent."""
    dim, window, tokens, theta = (numbers[k] for k in ("dim", "window", "tokens", "theta"))
    positions = np.arange(max(tokens, window) + 1)
    plain = snapped_frequencies(dim, window=window, theta=theta, variant="flux")
    images = []
    for axis, letter, name in zip(axes, "def", ROPE_VARIANTS[:3], strict=True):
        snapped = snapped_frequencies(dim, window=window, theta=theta, variant=name)
        difference = np.abs(wrapped(np.outer(plain - snapped, positions)))
        image = axis.imshow(
            difference,
            aspect="auto",
            vmin=0,
            vmax=math.pi,
            cmap="magma",
            interpolation="nearest",
            extent=(0, positions[-1], dim // 2 - 0.5, -0.5),
        )
        images.append(image)
        axis.axvline(window, color="white", linewidth=1, linestyle="--")
        axis.set(
            title=f"({letter}) Plain against {name}",
            xlabel="position p (tokens; dashed: window)",
            ylabel="band k",
        )
    bar = figure.colorbar(images[0], ax=list(axes), fraction=0.02, pad=0.01)
    bar.set_label("|phase difference| (rad)")


def pattern_numbers(*, band: int, dim: int, window: int, theta: float) -> list[dict[str, Any]]:
    """Stripe geometry of cos(h w_H + w w_W) in one band, per variant and grid.

    Returns:
        rows with `variant`, `grid` (tokens_h, tokens_w), `cycles_h`, `cycles_w` across the grid,
        `angle_deg` (direction of the wave vector, 45 is the diagonal) and `period_tokens`.
    """
    rows = []
    for variant in ROPE_VARIANTS:
        for grid in PATTERN_GRIDS:
            # (w_H, w_W): each axis stretches by its own extent.
            speeds = [
                float(
                    axis_spectrum(extent, dim, window=window, theta=theta, variant=variant)[0][band]
                )
                for extent in grid
            ]
            rows.append(
                {
                    "variant": variant,
                    "grid": list(grid),
                    "cycles_h": grid[0] * speeds[0] / (2 * math.pi),
                    "cycles_w": grid[1] * speeds[1] / (2 * math.pi),
                    "angle_deg": math.degrees(math.atan2(speeds[0], speeds[1])),
                    "period_tokens": 2 * math.pi / math.hypot(*speeds),
                }
            )
    return rows


def patterns_figure(*, band: int, dim: int, window: int, theta: float) -> Figure:
    """Supplement figure 2: cosine patterns of one band across aspect ratios, a row per variant."""
    figure = new_figure(10.5, 11)
    grids = PATTERN_GRIDS
    axes = figure.subplots(len(ROPE_VARIANTS), len(grids), sharex=False, sharey=False)
    rows = {
        (r["variant"], tuple(r["grid"])): r
        for r in pattern_numbers(band=band, dim=dim, window=window, theta=theta)
    }
    largest = max(max(grid) for grid in grids)
    for line, variant in zip(axes, ROPE_VARIANTS, strict=True):
        for axis, grid in zip(line, grids, strict=True):
            row = rows[variant, grid]
            h, w = np.arange(grid[0])[:, None], np.arange(grid[1])[None, :]
            turns = h * row["cycles_h"] / grid[0] + w * row["cycles_w"] / grid[1]
            axis.imshow(
                np.cos(2 * math.pi * turns),
                cmap="RdBu_r",
                vmin=-1,
                vmax=1,
                extent=(0, grid[1], grid[0], 0),
                interpolation="nearest",
            )
            # One scale for all panels, so that stripes can be compared by eye.
            axis.set(xlim=(0, largest), ylim=(largest, 0))
            axis.set_xticks([0, grid[1]])
            axis.set_yticks([0, grid[0]])
            for side in ("top", "right", "bottom", "left"):
                axis.spines[side].set_visible(False)
            axis.set_title(
                f"{row['cycles_h']:.2f} x {row['cycles_w']:.2f} cycles, {row['angle_deg']:.0f} deg",
                fontsize=9,
                loc="left",
            )
            if axis is line[0]:
                axis.set_ylabel(f"{variant}\nh (tokens)", fontsize=10)
            if variant == ROPE_VARIANTS[-1]:
                axis.set_xlabel(f"w (tokens)\ngrid {grid[0]} x {grid[1]}")
    figure.suptitle(
        f"cos(h w_H + w w_W) of band {band}, window {window} tokens; rows: RoPE variants",
        fontsize=12,
    )
    return figure
