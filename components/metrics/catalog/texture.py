"""Weight-free numbers of one picture: detail, entropy, flat area, sharpness, colourfulness."""

from __future__ import annotations

from pathlib import Path

from components.metrics.metric import FunctionMetric, Metric
from components.metrics.metric_card import NATIVE, MetricCard, MetricFamily


def _glcm(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.metrics.native.native_metrics import glcm_metrics

    return FunctionMetric(("glcm_score", "glcm_entropy_bits"), of_picture=glcm_metrics)


def _compression(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.signals.compression import jpeg95_ratio

    return FunctionMetric(
        ("compression_ratio",), of_picture=lambda rgb: {"compression_ratio": jpeg95_ratio([rgb])}
    )


def _texture(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.metrics.native.native_metrics import fused_metrics

    return FunctionMetric(("entropy_bits", "flat_fraction"), of_picture=fused_metrics)


def _sharpness(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.metrics.native.native_metrics import sharpness_metric

    return FunctionMetric(("laplacian_variance",), of_picture=sharpness_metric)


def _colourfulness(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    from components.metrics.native.native_metrics import colourfulness_metric

    return FunctionMetric(("colourfulness",), of_picture=colourfulness_metric)


GLCM = MetricFamily(
    cards=(
        MetricCard(
            "glcm_score",
            "GLCM score",
            "higher",
            "1",
            "native pixels of the top-left square",
            "glcm/diffusion4k/v1",
            "image",
            note="The entropy of the distinct values of the whole matrix, which is not the "
            "textbook GLCM entropy.",
            follows="Diffusion-4K, section 3.1, as its released code computes it",
        ),
        MetricCard(
            "glcm_entropy_bits",
            "GLCM entropy",
            "higher",
            "bit",
            "native pixels of the top-left square",
            "glcm-entropy/haralick64/v1",
            "image",
            follows="Haralick 1973, at the offsets of Diffusion-4K, section 3.1",
            note="-sum p log2 p of the co-occurrence probabilities, mean over 16 "
            "matrices and all 64 px patches; 0 to 12.",
        ),
    ),
    opener=_glcm,
)

COMPRESSION = MetricFamily(
    cards=(
        MetricCard(
            "compression_ratio",
            "Compression ratio",
            "lower",
            "1",
            NATIVE,
            "jpeg95-420/v1",
            "image",
            follows="Diffusion-4K, section 3.1: JPEG at quality 95, as its released code saves it",
            note="Raw bytes over JPEG bytes (quality 95, 4:2:0); for a set, sum over sum. "
            "Lower means more detail, and noise counts as detail.",
            decimals=2,
        ),
    ),
    opener=_compression,
)

TEXTURE = MetricFamily(
    cards=(
        MetricCard(
            "entropy_bits",
            "Entropy",
            "higher",
            "bit",
            NATIVE,
            "entropy/gray256/v1",
            "image",
            follows="UltraFlux, supplement, section 2.1",
            deviates="The paper does not say of which channel.",
        ),
        MetricCard(
            "flat_fraction",
            "Flat fraction",
            "lower",
            "1",
            "native pixels in 240 px patches",
            "flat/sobel-var800/v1",
            "image",
            follows="UltraFlux, supplement, section 2.1: 240 px patches, Sobel variance below 800",
            note="Not measurable where the image holds no full 240 px patch.",
        ),
    ),
    opener=_texture,
)

SHARPNESS = MetricFamily(
    cards=(
        MetricCard(
            "laplacian_variance",
            "Sharpness",
            "higher",
            "grey level²",
            NATIVE,
            "laplacian4/gray8/v1",
            "image",
            follows="variance of the 4-neighbour Laplacian, of no paper that is compared here",
            note="Noise counts as sharpness.",
            decimals=1,
        ),
    ),
    opener=_sharpness,
)

COLOURFULNESS = MetricFamily(
    cards=(
        MetricCard(
            "colourfulness",
            "Colourfulness",
            "neither",
            "1",
            NATIVE,
            "hasler-suesstrunk/v1",
            "image",
            follows="Hasler and Süsstrunk 2003",
            decimals=2,
        ),
    ),
    opener=_colourfulness,
)
