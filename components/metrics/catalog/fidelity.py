"""PSNR, SSIM, MS-SSIM and NMSE: a picture against its reference, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

from components.metrics.metric import FunctionMetric, Metric
from components.metrics.metric_card import NATIVE, MetricCard, MetricFamily


def _fidelity(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.metrics.native.native_metrics import pair_metrics

    return FunctionMetric(("psnr_db", "nmse", "ssim", "ms_ssim"), of_pair=pair_metrics)


FIDELITY = MetricFamily(
    cards=(
        MetricCard("psnr_db", "PSNR", "higher", "dB", NATIVE, "psnr/rgb8/v1", "pair", decimals=2),
        MetricCard(
            "ssim",
            "SSIM",
            "higher",
            "1",
            NATIVE,
            "ssim/gauss1.5-valid-rgb8/v1",
            "pair",
            note="11x11 Gaussian window, population moments, mean of the three channels.",
        ),
        MetricCard(
            "ms_ssim",
            "MS-SSIM",
            "higher",
            "1",
            NATIVE + " and four halvings",
            "ms-ssim/gauss1.5-valid-rgb8/v1",
            "pair",
            note="Five scales of averaged 2x2 pixels, per channel, mean of the three; edges of at "
            "least 176 px.",
        ),
        MetricCard(
            "nmse",
            "NMSE",
            "lower",
            "1",
            NATIVE,
            "nmse/energy-rgb8/v1",
            "pair",
            note="||x - y||² / ||x||² per image; the papers give no definition.",
            decimals=5,
        ),
    ),
    opener=_fidelity,
)
