"""PIQE: distorted blocks; needs no weights."""

from __future__ import annotations

from pathlib import Path

from components.metrics.metric import FunctionMetric, Metric
from components.metrics.metric_card import MetricCard, MetricFamily


def _piqe(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.metrics.native.piqe import piqe

    return FunctionMetric(("piqe",), of_picture=lambda rgb: {"piqe": piqe(rgb)})


PIQE = MetricFamily(
    cards=(
        MetricCard(
            "piqe",
            "PIQE",
            "lower",
            "0 to 100",
            "native pixels in 16 px blocks",
            "piqe/matlab-float64/v1",
            "image",
            follows="Venkatanath et al. 2015, as MATLAB's",
            note="How distorted the blocks with detail are; a picture without any has 100.",
            decimals=2,
        ),
    ),
    opener=_piqe,
)
