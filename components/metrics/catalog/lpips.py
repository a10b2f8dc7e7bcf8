"""LPIPS with either of its backbones: files of torchvision and of the lpips package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from components.files.install_hints import fetch_command
from components.metrics.metric import Metric
from components.metrics.metric_card import NATIVE, MetricCard, MetricFamily, Opener
from components.metrics.metric_weights import Weights


def _opener(metric_id: str, backbone: Literal["alex", "vgg"]) -> Opener:
    def open_it(files: tuple[Path, ...], digest: str, device: str) -> Metric:
        features, heads = files
        from components.metrics.networks.lpips import LpipsMetric

        return LpipsMetric(metric_id, backbone, (features, heads), digest, device)

    return open_it


def _heads(backbone: str) -> Weights:
    """The linear heads, which the lpips package carries."""
    return Weights(
        f"lpips/heads-{backbone}.pth",
        "6 to 7 KB",
        "BSD-2-Clause",
        fetch_command(
            "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"
            f"{backbone}.pth",
            f"weights/lpips/heads-{backbone}.pth",
        ),
    )


LPIPS = MetricFamily(
    cards=(
        MetricCard(
            "lpips",
            "LPIPS (VGG)",
            "lower",
            "1",
            NATIVE,
            "lpips/vgg16-v0.1/v1",
            "pair",
            note="Exact in tiles.",
            follows="Zhang et al. 2018, version 0.1, VGG-16",
            deviates="UltraFlux and Diffusion-4K name no backbone.",
            weights=Weights(
                "lpips/vgg16-397923af.pth",
                "528 MiB",
                "BSD-3-Clause",
                fetch_command(
                    "https://download.pytorch.org/models/vgg16-397923af.pth",
                    "weights/lpips/vgg16-397923af.pth",
                ),
                also=(_heads("vgg"),),
            ),
        ),
    ),
    opener=_opener("lpips", "vgg"),
)

LPIPS_ALEX = MetricFamily(
    cards=(
        MetricCard(
            "lpips_alex",
            "LPIPS (AlexNet)",
            "lower",
            "1",
            NATIVE,
            "lpips/alex-v0.1/v1",
            "pair",
            note="Exact in tiles.",
            follows="Zhang et al. 2018, version 0.1, AlexNet",
            deviates="UltraFlux and Diffusion-4K name no backbone.",
            weights=Weights(
                "lpips/alexnet-owt-7be5be79.pth",
                "233 MiB",
                "BSD-3-Clause",
                fetch_command(
                    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
                    "weights/lpips/alexnet-owt-7be5be79.pth",
                ),
                also=(_heads("alex"),),
            ),
        ),
    ),
    opener=_opener("lpips_alex", "alex"),
)
