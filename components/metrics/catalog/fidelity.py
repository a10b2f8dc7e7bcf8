"""PSNR, SSIM, MS-SSIM and NMSE: a picture against its reference, pixel by pixel.

Each is a family of its own, so that whoever asks for PSNR does not wait for MS-SSIM.
"""

from __future__ import annotations

import functools
from pathlib import Path

from components.images.arrays import ImageArray
from components.metrics.metric import FunctionMetric, Metric
from components.metrics.metric_card import NATIVE, MetricCard, MetricFamily

_UNSAID = "The papers state neither colour space nor window nor whether borders count."


def _of_pair(metric_id: str, theirs: ImageArray, ours: ImageArray) -> dict[str, float | None]:
    # When the first pair is measured: the process that only hands pictures out need not wait.
    from components.metrics.native.native_metrics import pair_metric

    return {metric_id: pair_metric(metric_id, theirs, ours)}


def _family(card: MetricCard) -> MetricFamily:
    def open_it(files: tuple[Path, ...], digest: str, device: str) -> Metric:
        return FunctionMetric((card.id,), of_pair=functools.partial(_of_pair, card.id))

    return MetricFamily(cards=(card,), opener=open_it)


PSNR = _family(
    MetricCard(
        "psnr_db",
        "PSNR",
        "higher",
        "dB",
        NATIVE,
        "psnr/rgb8/v1",
        "pair",
        decimals=2,
        follows="10 log10(255² / mean squared error) of 8-bit RGB",
        deviates=_UNSAID,
    )
)
SSIM = _family(
    MetricCard(
        "ssim",
        "SSIM",
        "higher",
        "1",
        NATIVE,
        "ssim/gauss1.5-valid-rgb8/v1",
        "pair",
        note="11x11 Gaussian window, population moments, mean of the three channels.",
        follows="Wang et al. 2004",
        deviates=_UNSAID,
    )
)
MS_SSIM = _family(
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
        follows="Wang et al. 2003",
    )
)
NMSE = _family(
    MetricCard(
        "nmse",
        "NMSE",
        "lower",
        "1",
        NATIVE,
        "nmse/energy-rgb8/v1",
        "pair",
        note="||x - y||² / ||x||² per image.",
        follows="the papers give no definition",
        deviates="Diffusion-4K prints 0.08 on its training set and UltraFlux 0.015 on the "
        "evaluation set for one autoencoder.",
        decimals=5,
    )
)
