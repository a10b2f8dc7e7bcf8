"""CLIP score, PickScore and LAION aesthetics: all read a picture through a CLIP network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from components.files.install_hints import fetch_command
from components.metrics.metric import Metric
from components.metrics.metric_card import MetricCard, MetricFamily, Opener
from components.metrics.metric_weights import Weights, hub

_L14 = hub(
    "clip-vit-large-patch14",
    "openai/clip-vit-large-patch14",
    "1.7 GB",
    "MIT",
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    needs=("model.safetensors", "config.json", "tokenizer.json"),
)
_B16 = hub(
    "clip-vit-base-patch16",
    "openai/clip-vit-base-patch16",
    "600 MB",
    "MIT",
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    needs=("model.safetensors", "config.json", "tokenizer.json"),
)
_H14_TOKENIZER = replace(
    hub(
        "clip-vit-h-14-tokenizer",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "4 MB",
        "MIT",
        "tokenizer.json",
        needs=("tokenizer.json",),
    ),
    holds_network=False,
)


def _clip_score(metric_id: str) -> Opener:
    def open_it(files: tuple[Path, ...], digest: str, device: str) -> Metric:
        (folder,) = files
        from components.metrics.networks.clip import ClipEncoder, PromptMetric

        return PromptMetric(metric_id, ClipEncoder(folder, device), "cosine", digest)

    return open_it


def _pickscore(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    folder, tokenizer = files
    from components.metrics.networks.clip import ClipEncoder, PromptMetric

    return PromptMetric("pickscore", ClipEncoder(folder, device, tokenizer), "logit", digest)


def _laion_aesthetics(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    head, folder = files
    import torch

    from components.metrics.networks.clip import AestheticMetric, ClipEncoder

    state = torch.load(head, map_location="cpu", weights_only=True)
    return AestheticMetric(ClipEncoder(folder, device), state, digest)


def _clip_family(
    metric_id: str, name: str, protocol: str, weights: Weights, *, follows: str, deviates: str
) -> MetricFamily:
    return MetricFamily(
        cards=(
            MetricCard(
                metric_id,
                name,
                "higher",
                "0 to 100",
                "224 px",
                protocol,
                "prompt and image",
                note="Reads 77 tokens, so the end of a long caption is not seen, and the centre "
                "square, so the sides of a wide picture are not.",
                weights=weights,
                follows=follows,
                deviates=deviates,
            ),
        ),
        opener=_clip_score(metric_id),
    )


CLIP_SCORE = _clip_family(
    "clip_score",
    "CLIP score",
    "clip/vit-l-14/v1",
    _L14,
    follows="Hessel et al. 2021 without its factor of 2.5: max(100 cos, 0), by ViT-L/14",
    deviates="Not the network of Diffusion-4K's script (`clip_score_b16`).",
)

CLIP_SCORE_B16 = _clip_family(
    "clip_score_b16",
    "CLIP score (B/16)",
    "clip/vit-b-16/v1",
    _B16,
    follows="Diffusion-4K's released script: max(100 cos, 0) by ViT-B/16",
    deviates="The script was not seen run; UltraFlux states no network for its column.",
)

PICKSCORE = MetricFamily(
    cards=(
        MetricCard(
            "pickscore",
            "PickScore",
            "higher",
            "1",
            "224 px",
            "pickscore/v1",
            "prompt and image",
            note="77 tokens, centre square.",
            follows="Kirstain et al. 2023: learnt temperature times the cosine of CLIP ViT-H/14",
            deviates="UltraFlux states no checkpoint.",
            weights=hub(
                "pickscore",
                "yuvalkirstain/PickScore_v1",
                "about 4 GB",
                "see its model card",
                needs=("config.json",),
                also=(_H14_TOKENIZER,),
            ),
        ),
    ),
    opener=_pickscore,
)

LAION_AESTHETICS = MetricFamily(
    cards=(
        MetricCard(
            "laion_aesthetics",
            "LAION aesthetics",
            "higher",
            "about 1 to 10",
            "224 px",
            "laion-aesthetics/sac-logos-ava1-l14/v1",
            "image",
            follows="improved-aesthetic-predictor, linear head on CLIP ViT-L/14",
            deviates="Which of LAION's predictors Diffusion-4K's column reads is not stated.",
            weights=Weights(
                "laion/sac+logos+ava1-l14-linearMSE.pth",
                "4 MB",
                "Apache-2.0",
                fetch_command(
                    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
                    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
                    "weights/laion/sac+logos+ava1-l14-linearMSE.pth",
                ),
                also=(_L14,),
            ),
        ),
    ),
    opener=_laion_aesthetics,
)
