"""FD-DINOv2: a distance of two sets in DINOv2's features."""

from __future__ import annotations

from pathlib import Path

from components.metrics.metric import Metric
from components.metrics.metric_card import MetricCard, MetricFamily
from components.metrics.metric_weights import hub


def _dino(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    (folder,) = files
    from components.metrics.networks.set_metrics import dino_metric

    return dino_metric(folder, digest, device)


FD_DINOV2 = MetricFamily(
    cards=(
        MetricCard(
            "fd_dinov2",
            "FD-DINOv2",
            "lower",
            "1",
            "224 px, antialiased, squashed",
            "fd/dinov2-vitl14-cls-clean224/v1",
            "set pair",
            follows="Stein et al. 2023",
            note="Class token of ViT-L/14; nearly all bias below a few thousand images.",
            weights=hub("dinov2-large", "facebook/dinov2-large", "1.2 GB", "Apache-2.0"),
        ),
    ),
    opener=_dino,
)
