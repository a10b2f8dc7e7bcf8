"""CLIP score, PickScore and LAION aesthetics: all read a picture through a CLIP network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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


CLIP_SCORE = MetricFamily(
    cards=(
        MetricCard(
            "clip_score",
            "CLIP score",
            "higher",
            "0 to 100",
            "224 px",
            "clip/vit-l-14/v1",
            "prompt and image",
            note="max(100 cos, 0); reads 77 tokens, so the end of a long caption is not seen, and "
            "the centre square, so the sides of a wide picture are not.",
            weights=_L14,
        ),
    ),
    opener=_clip_score("clip_score"),
)

CLIP_SCORE_B16 = MetricFamily(
    cards=(
        MetricCard(
            "clip_score_b16",
            "CLIP score (B/16)",
            "higher",
            "0 to 100",
            "224 px",
            "clip/vit-b-16/v1",
            "prompt and image",
            note="As `clip_score` with ViT-B/16, the network of Diffusion-4K's released script, "
            "whose numbers stand in the papers' column.",
            weights=_B16,
        ),
    ),
    opener=_clip_score("clip_score_b16"),
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
            note="Learnt temperature times the cosine of CLIP ViT-H/14; 77 tokens, centre square.",
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
            weights=Weights(
                "laion/sac+logos+ava1-l14-linearMSE.pth",
                "4 MB",
                "Apache-2.0",
                "copy sac+logos+ava1-l14-linearMSE.pth (improved-aesthetic-predictor) to "
                "weights/laion/",
                also=(_L14,),
            ),
        ),
    ),
    opener=_laion_aesthetics,
)
