"""ArtiMuse, by a scorer process that runs beside this one."""

from __future__ import annotations

from pathlib import Path

from components.files.install_hints import download_command
from components.metrics.metric import Metric
from components.metrics.metric_card import MetricCard, MetricFamily
from components.metrics.metric_weights import Weights


def _artimuse(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.metrics.networks.corpus_scorers import ArtiMuseMetric, artimuse_url

    url = artimuse_url()
    from components.corpus.quality.scorer_protocol import ScorerClient

    return ArtiMuseMetric(ScorerClient(url))


ARTIMUSE = MetricFamily(
    cards=(
        MetricCard(
            "artimuse",
            "ArtiMuse",
            "higher",
            "0 to 100",
            "448 px, squashed",
            "artimuse/v1",
            "image",
            follows="ArtiMuse's released program and checkpoint",
            deviates="It is given a JPEG (quality 95, 4:4:4); UltraFlux states no checkpoint.",
            note="Pins an old transformers release, so it runs as a process of its own, whose "
            "address stands in ULTRAFLUX_ARTIMUSE_URL.",
            weights=Weights(
                "artimuse",
                "about 17 GB",
                "see its model card",
                download_command("Thunderbolt215215/ArtiMuse", "weights/artimuse"),
            ),
        ),
    ),
    opener=_artimuse,
    reads_weights=False,
)
