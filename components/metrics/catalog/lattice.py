"""Lattice: how strong a grid of 2, 16 or 32 px lies over the whole picture; needs no weights."""

from __future__ import annotations

from pathlib import Path

from components.metrics.metric import FunctionMetric, Metric
from components.metrics.metric_card import NATIVE, MetricCard, MetricFamily

_IDS = ("lattice_2px", "lattice_16px", "lattice_32px")
_NOTE = (
    "Root mean square of the part of the luminance that repeats exactly, above the frequencies "
    "around it; a sine of amplitude a gives a / sqrt(2). JPEG's 8 px are left out. Demosaicing "
    "leaves some at 2 px in photographs. None below 256 px."
)


def _open(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.metrics.native.lattice import lattice_levels

    return FunctionMetric(_IDS, of_picture=lattice_levels)


LATTICE = MetricFamily(
    cards=tuple(
        MetricCard(
            name,
            f"Lattice {name.removeprefix('lattice_').removesuffix('px')} px",
            "lower",
            "levels of 255",
            NATIVE,
            f"{name.replace('_', '-')}/hann-ring6/v1",
            "image",
            note=_NOTE,
            follows="this project's own, of no paper that is compared here",
        )
        for name in _IDS
    ),
    opener=_open,
)
