"""What SNR-HW weighs: c(t), omega(t) and the effective weight of a velocity error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from components.files.figures import BLUE, ORANGE, RED, new_figure
from components.objectives.snr_huber import (
    SnrHuberSettings,
    huber_threshold,
    pseudo_huber,
    time_weight,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 1001
TABLE_T = (0.0, 0.1, 0.3, 0.5, 0.541, 0.7, 0.9, 0.99, 1.0)
ERRORS = (0.1, 1.0, 4.0)
"""Haar coefficients of the velocity error, in units of the latents' spread."""
_COLOURS = (BLUE, ORANGE, RED)


def objective_numbers(settings: SnrHuberSettings) -> dict[str, Any]:
    """Curves over t in [0, 1].

    `effective_weight[e]` is omega(t) rho_c(t e) / e^2: how much a velocity error of size e counts,
    relative to flow matching, where it is 1 at every t.

    Args:
        settings: objective settings.

    Returns:
        `settings`, `t`, `c`, `omega_paper`, `omega_fm_exact`, `effective_weight`,
        `quadratic_limit` (omega t^2 / 2, the weight of a vanishing error).
    """
    t = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    both = {
        kind: time_weight(t, settings.model_copy(update={"time_weight": kind}))
        for kind in ("paper", "fm_exact")
    }
    omega, threshold = time_weight(t, settings), huber_threshold(t, settings)
    effective = {
        str(error): (omega * pseudo_huber(t * error, threshold) / error**2).tolist()
        for error in ERRORS
    }
    return {
        "settings": settings.model_dump(),
        "t": t.tolist(),
        "c": threshold.tolist(),
        "omega_paper": both["paper"].tolist(),
        "omega_fm_exact": both["fm_exact"].tolist(),
        "effective_weight": effective,
        "quadratic_limit": (0.5 * omega * t**2).tolist(),
    }


def objective_rows(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per noise level of `TABLE_T`."""
    rows = []
    for t in TABLE_T:
        index = round(t * (LEVELS - 1))
        columns = [numbers["c"], numbers["omega_paper"], numbers["omega_fm_exact"]]
        columns += list(numbers["effective_weight"].values())
        rows.append((f"{numbers['t'][index]:.3f}", *(f"{c[index]:.4g}" for c in columns)))
    return rows


def objective_figure(numbers: dict[str, Any]) -> Figure:
    """c(t), omega(t) and the effective weight over t."""
    figure = new_figure(13, 4.2)
    first, second, third = figure.subplots(1, 3)
    t = numbers["t"]
    chosen = numbers["settings"]
    first.plot(t, numbers["c"], color=_COLOURS[0])
    first.set(title="(a) Huber threshold", ylabel="c(t), latent units")
    first.set_ylim(0, chosen["c_max"] * 1.08)
    second.plot(t, numbers["omega_paper"], color=_COLOURS[0], label="paper")
    second.plot(t, numbers["omega_fm_exact"], color=_COLOURS[1], ls="--", label="fm_exact")
    second.set(title="(b) Sample weight", ylabel="omega(t) (log)", yscale="log")
    for colour, (error, curve) in zip(_COLOURS, numbers["effective_weight"].items(), strict=True):
        third.plot(t, curve, color=colour, label=f"error {error}")
    third.plot(t, numbers["quadratic_limit"], color="black", lw=0.9, ls=":", label="error to 0")
    third.axhline(1, color="gray", lw=0.9, ls="--", label="flow matching")
    third.set(
        title=f"(c) Weight of a velocity error ({chosen['time_weight']})",
        ylabel="loss / error^2 (log)",
        yscale="log",
        ylim=(1e-3, 10),
    )
    for axis in (first, second, third):
        axis.set(xlabel="t (0 data, 1 noise)", xlim=(0, 1))
        axis.axvspan(0.541, 1, color="gray", alpha=0.12, lw=0)
        axis.grid(alpha=0.25)
    first.text(0.56, chosen["c_max"] * 1.0, "SACL stage 2", fontsize=9, color="dimgray")
    second.legend()
    third.legend(fontsize=8.5, loc="upper left")
    return figure
