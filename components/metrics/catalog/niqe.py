"""NIQE: distance to the statistics of photographs; needs a small parameter file."""

from __future__ import annotations

from pathlib import Path

from components.files.install_hints import download_command
from components.metrics.metric import Metric
from components.metrics.metric_card import MetricCard, MetricFamily
from components.metrics.metric_weights import Weights


def _niqe(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    (file,) = files
    from components.metrics.native.niqe import NiqeMetric

    return NiqeMetric(file, digest)


NIQE = MetricFamily(
    cards=(
        MetricCard(
            "niqe",
            "NIQE",
            "lower",
            "1",
            "native pixels in 96 px blocks, and half the size",
            "niqe/pris36-96-float64/v1",
            "image",
            follows="Mittal et al. 2013, the released parameters",
            note="Distance to the statistics of undistorted photographs, which "
            "were far smaller than 4K.",
            weights=Weights(
                "niqe/niqe_modelparameters.mat",
                "about 10 KB",
                "University of Texas at Austin: any use, with its notice and citation; pyiqa's "
                "copy is in a CC-BY-NC-SA-4.0 repository",
                download_command(
                    "chaofengc/IQA-PyTorch-Weights", "weights/niqe", "niqe_modelparameters.mat"
                ),
            ),
        ),
    ),
    opener=_niqe,
)
