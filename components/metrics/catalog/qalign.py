"""Q-Align, as the corpus uses it."""

from __future__ import annotations

from pathlib import Path

from components.metrics.metric import DeferredMetric, ImageMetric, Metric
from components.metrics.metric_card import MetricCard, MetricFamily
from components.metrics.metric_weights import hub


def _qalign(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    (folder,) = files

    def load() -> ImageMetric:
        from components.corpus.quality.qalign import QAlign
        from components.metrics.networks.corpus_scorers import QAlignMetric

        return QAlignMetric(QAlign(folder, device), digest)

    return DeferredMetric(("qalign",), digest, load)


QALIGN = MetricFamily(
    cards=(
        MetricCard(
            "qalign",
            "Q-Align",
            "higher",
            "1 to 5",
            "448 px",
            "qalign/one-align/v1",
            "image",
            follows="Wu et al. 2023, released checkpoint, quality",
            deviates="UltraFlux states neither checkpoint nor task for its column.",
            weights=hub("one-align", "q-future/one-align", "about 16 GB", "MIT"),
        ),
    ),
    opener=_qalign,
)
