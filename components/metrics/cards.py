"""One card per metric: what it sees, which way is better, its protocol and its weights.

A metric whose weights are absent is never approximated by another one: its card says which
command fetches them, and everything else is still measured.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from components.metrics.metric_weights import (
    CLIP_H14_TOKENIZER,
    CLIP_L14,
    HPSV3,
    INCEPTION,
    Weights,
    hub,
    lpips_heads,
    place_of,
)

Direction = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class MetricCard:
    """What a reader must know before comparing two numbers."""

    id: str
    """Key in `scores.parquet` and `metrics.json`."""
    name: str
    direction: Direction
    unit: str
    sees: str
    """What reaches the metric when the image is 4096 x 4096."""
    protocol: str
    """Changes whenever a change of the computation moves the number."""
    needs: Literal["image", "pair", "set pair", "prompt and image"]
    note: str = ""
    weights: Weights | None = None
    decimals: int = 3
    """Digits after the point in tables."""

    @property
    def arrow(self) -> str:
        """Arrow as the papers print it."""
        return {"higher": "↑", "lower": "↓", "neither": ""}[self.direction]


NATIVE = "native pixels"

CARDS: tuple[MetricCard, ...] = (
    MetricCard("psnr_db", "PSNR", "higher", "dB", NATIVE, "psnr/rgb8/v1", "pair", decimals=2),
    MetricCard(
        "ssim",
        "SSIM",
        "higher",
        "1",
        NATIVE,
        "ssim/gauss1.5-valid-rgb8/v1",
        "pair",
        note="11x11 Gaussian window, population moments, mean of the three channels.",
    ),
    MetricCard(
        "ms_ssim",
        "MS-SSIM",
        "higher",
        "1",
        NATIVE + " and four halvings",
        "ms-ssim/gauss1.5-valid-rgb8/v1",
        "pair",
        note="Five scales of averaged 2x2 pixels, per channel, mean of the three; edges of at "
        "least 176 px.",
    ),
    MetricCard(
        "nmse",
        "NMSE",
        "lower",
        "1",
        NATIVE,
        "nmse/energy-rgb8/v1",
        "pair",
        note="||x - y||² / ||x||² per image; the papers give no definition.",
        decimals=5,
    ),
    MetricCard(
        "glcm_score",
        "GLCM score",
        "higher",
        "1",
        "native pixels of the top-left square",
        "glcm/diffusion4k/v1",
        "image",
        note="Diffusion-4K's released code; the entropy of the distinct values of the whole "
        "matrix, which is not the textbook GLCM entropy.",
    ),
    MetricCard(
        "glcm_entropy_bits",
        "GLCM entropy",
        "higher",
        "bit",
        "native pixels of the top-left square",
        "glcm-entropy/haralick64/v1",
        "image",
        note="-sum p log2 p of the co-occurrence probabilities (Haralick 1973), mean over 16 "
        "matrices and all 64 px patches; 0 to 12.",
    ),
    MetricCard(
        "compression_ratio",
        "Compression ratio",
        "lower",
        "1",
        NATIVE,
        "jpeg95-420/v1",
        "image",
        note="Raw bytes over JPEG bytes (quality 95, 4:2:0); for a set, sum over sum. "
        "Lower means more detail, and noise counts as detail.",
        decimals=2,
    ),
    MetricCard(
        "entropy_bits",
        "Entropy",
        "higher",
        "bit",
        NATIVE,
        "entropy/gray256/v1",
        "image",
    ),
    MetricCard(
        "flat_fraction",
        "Flat fraction",
        "lower",
        "1",
        "native pixels in 240 px patches",
        "flat/sobel-var800/v1",
        "image",
        note="Not measurable where the image holds no full 240 px patch.",
    ),
    MetricCard(
        "laplacian_variance",
        "Sharpness",
        "higher",
        "grey level²",
        NATIVE,
        "laplacian4/gray8/v1",
        "image",
        note="Variance of the 4-neighbour Laplacian; noise counts as sharpness.",
        decimals=1,
    ),
    MetricCard(
        "colourfulness",
        "Colourfulness",
        "neither",
        "1",
        NATIVE,
        "hasler-suesstrunk/v1",
        "image",
        note="Hasler and Süsstrunk 2003.",
        decimals=2,
    ),
    MetricCard(
        "piqe",
        "PIQE",
        "lower",
        "0 to 100",
        "native pixels in 16 px blocks",
        "piqe/matlab-float64/v1",
        "image",
        note="Venkatanath et al. 2015: how distorted the blocks with detail are; a picture without "
        "any has 100.",
        decimals=2,
    ),
    MetricCard(
        "niqe",
        "NIQE",
        "lower",
        "1",
        "native pixels in 96 px blocks, and half the size",
        "niqe/pris36-96-float64/v1",
        "image",
        note="Mittal et al. 2013: distance to the statistics of undistorted photographs, which "
        "were far smaller than 4K.",
        weights=Weights(
            "niqe/niqe_modelparameters.mat",
            "about 10 KB",
            "University of Texas at Austin: any use, with its notice and citation; pyiqa's copy is "
            "in a CC-BY-NC-SA-4.0 repository",
            "hf download chaofengc/IQA-PyTorch-Weights niqe_modelparameters.mat --local-dir "
            "weights/niqe",
        ),
    ),
    MetricCard(
        "lpips",
        "LPIPS (VGG)",
        "lower",
        "1",
        NATIVE,
        "lpips/vgg16-v0.1/v1",
        "pair",
        note="Exact in tiles. The papers do not name their backbone.",
        weights=Weights(
            "lpips/vgg16-397923af.pth",
            "528 MiB",
            "BSD-3-Clause",
            "curl -Lo weights/lpips/vgg16-397923af.pth "
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            also=(lpips_heads("vgg"),),
        ),
    ),
    MetricCard(
        "lpips_alex",
        "LPIPS (AlexNet)",
        "lower",
        "1",
        NATIVE,
        "lpips/alex-v0.1/v1",
        "pair",
        note="Exact in tiles.",
        weights=Weights(
            "lpips/alexnet-owt-7be5be79.pth",
            "233 MiB",
            "BSD-3-Clause",
            "curl -Lo weights/lpips/alexnet-owt-7be5be79.pth "
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            also=(lpips_heads("alex"),),
        ),
    ),
    MetricCard(
        "rfid",
        "rFID",
        "lower",
        "1",
        "299 px",
        "fid/inception2048-noantialias/v1",
        "set pair",
        note="Nearly all bias below a few thousand images.",
        weights=INCEPTION,
    ),
    MetricCard(
        "fid",
        "FID",
        "lower",
        "1",
        "299 px",
        "fid/inception2048-noantialias/v1",
        "set pair",
        note="Newer torchmetrics antialiases the resize: another metric id, other numbers.",
        weights=INCEPTION,
    ),
    MetricCard(
        "kid",
        "KID",
        "lower",
        "1",
        "299 px",
        "kid/inception2048-noantialias-poly3/v1",
        "set pair",
        note="Unbiased squared MMD over all pictures, so levels of small sets can be read; may be "
        "negative.",
        weights=INCEPTION,
        decimals=5,
    ),
    MetricCard(
        "kid_spread",
        "KID spread",
        "neither",
        "1",
        "299 px",
        "kid-spread/100-subsets-of-half-max1000-seed0/v1",
        "set pair",
        note="Standard deviation of KID over 100 random subsets of half the smaller set; not a "
        "standard error.",
        weights=INCEPTION,
        decimals=5,
    ),
    MetricCard(
        "fid_clean",
        "FID (clean)",
        "lower",
        "1",
        "299 px, antialiased",
        "fid/inception2048-clean/v1",
        "set pair",
        note="clean-fid's resize (PIL bicubic on float channels) before the network of `fid`; "
        "nearly all bias below a few thousand images.",
        weights=INCEPTION,
    ),
    MetricCard(
        "patch_fid",
        "Patch FID",
        "lower",
        "1",
        "native pixels in 299 px patches",
        "fid/inception2048-patch299-centred-grid/v1",
        "set pair",
        note="Every full patch of a centred grid is a row (169 at 4096 x 4096); patches of one "
        "picture are not independent.",
        weights=INCEPTION,
    ),
    MetricCard(
        "patch_kid",
        "Patch KID",
        "lower",
        "1",
        "native pixels in 299 px patches",
        "kid/inception2048-patch299-centred-grid-poly3/v1",
        "set pair",
        weights=INCEPTION,
        decimals=5,
    ),
    MetricCard(
        "patch_kid_spread",
        "Patch KID spread",
        "neither",
        "1",
        "native pixels in 299 px patches",
        "kid-spread/patch299-100-subsets-of-half-max1000-seed0/v1",
        "set pair",
        weights=INCEPTION,
        decimals=5,
    ),
    MetricCard(
        "fd_dinov2",
        "FD-DINOv2",
        "lower",
        "1",
        "224 px, antialiased, squashed",
        "fd/dinov2-vitl14-cls-clean224/v1",
        "set pair",
        note="Class token of ViT-L/14; nearly all bias below a few thousand images.",
        weights=hub("dinov2-large", "facebook/dinov2-large", "1.2 GB", "Apache-2.0"),
    ),
    MetricCard(
        "hpsv3",
        "HPSv3",
        "higher",
        "1",
        "200,704 pixels in its own shape (448 px for a square)",
        "hpsv3/qwen2-vl-7b-mean/v1",
        "prompt and image",
        note="Mean of the preference; instruction, size, head and positions follow the released "
        "code. Equality with its numbers on the released weights was not confirmed.",
        weights=HPSV3,
    ),
    MetricCard(
        "hpsv3_sigma",
        "HPSv3 deviation",
        "neither",
        "1",
        "200,704 pixels in its own shape (448 px for a square)",
        "hpsv3/qwen2-vl-7b-deviation/v1",
        "prompt and image",
        note="exp of the head's second output, as in the training loss: how sure the model is.",
        weights=HPSV3,
    ),
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
            also=(CLIP_H14_TOKENIZER,),
        ),
    ),
    MetricCard(
        "artimuse",
        "ArtiMuse",
        "higher",
        "0 to 100",
        "448 px, squashed",
        "artimuse/v1",
        "image",
        note="Pins an old transformers release, so it runs as a process of its own, whose address "
        "stands in ULTRAFLUX_ARTIMUSE_URL; gets the picture as JPEG (95, 4:4:4).",
        weights=Weights(
            "artimuse",
            "about 17 GB",
            "see its model card",
            "copy the released ArtiMuse checkpoint folder to weights/artimuse/",
        ),
    ),
    MetricCard(
        "clip_score",
        "CLIP score",
        "higher",
        "0 to 100",
        "224 px",
        "clip/vit-l-14/v1",
        "prompt and image",
        note="max(100 cos, 0); reads 77 tokens, so the end of a long caption is not seen, and the "
        "centre square, so the sides of a wide picture are not.",
        weights=CLIP_L14,
    ),
    MetricCard(
        "qalign",
        "Q-Align",
        "higher",
        "1 to 5",
        "448 px",
        "qalign/one-align/v1",
        "image",
        weights=hub("one-align", "q-future/one-align", "about 16 GB", "MIT"),
    ),
    MetricCard(
        "musiq",
        "MUSIQ",
        "higher",
        "0 to 100",
        "native pixels and two smaller scales",
        "musiq/koniq/v1",
        "image",
        note="All native 32 px patches, and copies with longer edges of 384 and 224 px.",
        weights=Weights(
            "musiq/musiq_koniq_ckpt-e95806b9.pth",
            "about 100 MiB",
            "Apache-2.0",
            "copy musiq_koniq_ckpt-e95806b9.pth (pyiqa's weight release) to weights/musiq/",
        ),
    ),
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
            also=(CLIP_L14,),
        ),
    ),
)


def card(metric: str) -> MetricCard:
    """The card of one metric id.

    Raises:
        ValueError: no such metric; the message lists the known ids.
    """
    for candidate in CARDS:
        if candidate.id == metric:
            return candidate
    known = ", ".join(candidate.id for candidate in CARDS)
    raise ValueError(f"unknown metric '{metric}'; known: {known}")


def status(metric: MetricCard, measured: Collection[str], weights_dir: Path) -> str:
    """Why there is or is not a number for this metric, in one line.

    Args:
        metric: the card.
        measured: metric ids with at least one value.
        weights_dir: the repository's `weights/` folder; it and the caches are looked through as by
            `ultraflux weights list`, and nothing is read.
    """
    if metric.id in measured:
        return "measured"
    if metric.weights is None:
        return "no input"
    for part in (metric.weights, *metric.weights.also):
        if place_of(part, weights_dir) is None:
            return f"weights missing: {part.command}"
    return "weights found, not measured"
