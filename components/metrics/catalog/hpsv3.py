"""HPSv3: human preference, by a language model that reads the picture and its prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from components.metrics.metric import DeferredMetric, ImageMetric, Metric
from components.metrics.metric_card import MetricCard, MetricFamily
from components.metrics.metric_weights import hub

_QWEN2_VL_TEXTS = replace(
    hub(
        "qwen2-vl-7b-texts",
        "Qwen/Qwen2-VL-7B-Instruct",
        "7 MB",
        "Apache-2.0",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        needs=("config.json", "tokenizer.json"),
    ),
    holds_network=False,
)
"""Configuration and tokenizer alone."""
_WEIGHTS = hub(
    "hpsv3",
    "MizzenAI/HPSv3",
    "about 17 GB",
    "code MIT; weights: see their model card",
    "HPSv3.safetensors",
    needs=("HPSv3.safetensors",),
    also=(_QWEN2_VL_TEXTS,),
)


def _hpsv3(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    folder, texts = files

    def load() -> ImageMetric:
        from components.metrics.networks.hpsv3 import CHECKPOINT, HpsV3, HpsV3Metric

        return HpsV3Metric(HpsV3(folder / CHECKPOINT, texts, device), digest)

    return DeferredMetric(("hpsv3", "hpsv3_sigma"), digest, load)


HPSV3 = MetricFamily(
    cards=(
        MetricCard(
            "hpsv3",
            "HPSv3",
            "higher",
            "1",
            "200,704 pixels in its own shape (448 px for a square)",
            "hpsv3/qwen2-vl-7b-mean/v1",
            "prompt and image",
            note="Mean of the preference.",
            follows="HPSv3's released code: instruction, size, head and positions",
            deviates="Equality with its numbers on the released weights was not confirmed; "
            "UltraFlux states no checkpoint.",
            weights=_WEIGHTS,
        ),
        MetricCard(
            "hpsv3_sigma",
            "HPSv3 deviation",
            "neither",
            "1",
            "200,704 pixels in its own shape (448 px for a square)",
            "hpsv3/qwen2-vl-7b-deviation/v1",
            "prompt and image",
            follows="HPSv3's released code",
            note="exp of the head's second output, as in the training loss: how sure the model is.",
            weights=_WEIGHTS,
        ),
    ),
    opener=_hpsv3,
)
