"""MUSIQ: quality from native patches at three scales."""

from __future__ import annotations

from pathlib import Path

from components.files.install_hints import download_command
from components.metrics.metric import Metric
from components.metrics.metric_card import MetricCard, MetricFamily
from components.metrics.metric_weights import Weights


def _musiq(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    (file,) = files
    from components.metrics.networks.corpus_scorers import open_musiq

    return open_musiq(file, digest, device)


MUSIQ = MetricFamily(
    cards=(
        MetricCard(
            "musiq",
            "MUSIQ",
            "higher",
            "0 to 100",
            "native pixels and two smaller scales",
            "musiq/koniq/v1",
            "image",
            follows="Ke et al. 2021, checkpoint of KonIQ",
            deviates="UltraFlux states no checkpoint; Diffusion-4K, table 1, neither.",
            note="All native 32 px patches, and copies with longer edges of 384 and 224 px.",
            weights=Weights(
                "musiq/musiq_koniq_ckpt-e95806b9.pth",
                "about 100 MiB",
                "Apache-2.0",
                download_command(
                    "chaofengc/IQA-PyTorch-Weights",
                    "weights/musiq",
                    "musiq_koniq_ckpt-e95806b9.pth",
                ),
            ),
        ),
    ),
    opener=_musiq,
)
