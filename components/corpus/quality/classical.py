"""Classical image quality and aesthetics: closed formulas, no learned weights, named as such.

They stand in where Q-Align and ArtiMuse are not available, so that the pipeline runs without
weights. Both scores lie between 0 and 1 and compare images of one corpus with one another; they
have no relation to Q-Align's 1 to 5 or ArtiMuse's 0 to 100. Every image is seen as the derivative
of the signals stage, so that scores do not depend on its resolution.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from components.corpus.derivatives import Derivative
from components.corpus.quality.kinds import Kind
from components.corpus.quality.scorer import QUALITY_SCHEMA, DerivativeScorer, ScoringJob
from components.engine.map_items import EngineLimits
from components.images.decoding import decode_rgb
from components.signals.appearance import laplacian_variance, opponent_colours
from components.signals.flat_regions import grayscale

QUALITY_SCORER = "classical-quality-v1"
AESTHETIC_SCORER = "classical-aesthetic-v1"

# Values at which a saturating term reaches one half, or 1/e; chosen on ordinary photographs at
# about one megapixel so that terms spread over their range. They order images, nothing more.
_LAPLACIAN_HALF = 400.0
_NOISE_SIGMA_SCALE = 10.0
_COLOURFULNESS_HALF = 40.0
_CONTRAST_FULL = 0.30
_CLIPPED_SHARE_BAD = 0.25

_IMMERKAER_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)
# Ke, Tang and Jing: the box that holds 98% of the edge energy along each axis.
_EDGE_ENERGY_SHARE = 0.98
_EDGE_MAP_PX = 100


def sharpness(gray: np.ndarray) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al., ICPR 2000), v / (v + 400).

    Args:
        gray: (H, W) uint8.
    """
    variance = laplacian_variance(gray, borders=True)
    return variance / (variance + _LAPLACIAN_HALF)


def noise_sigma(gray: np.ndarray) -> float:
    """Noise standard deviation in gray levels: Immerkaer's operator away from edges.

    Immerkaer (CVIU 1996) averages |L * I|; Tai and Yang (2008) leave edge pixels out, because they
    answer to the operator as noise does. Here: the half of the pixels with the weakest gradient.

    Args:
        gray: (H, W) uint8, edges at least 3.
    """
    response = np.abs(cv2.filter2D(gray, cv2.CV_64F, _IMMERKAER_KERNEL))[1:-1, 1:-1]
    # 16 bits hold a Sobel sum of bytes (at most 1,020), 8 would wrap.
    gradient = np.abs(cv2.Sobel(gray, cv2.CV_16S, 1, 0)).astype(np.int32)
    gradient += np.abs(cv2.Sobel(gray, cv2.CV_16S, 0, 1))
    gradient = gradient[1:-1, 1:-1]
    # The median and not a fixed gradient: a calm picture has edges too, and a busy one some calm.
    calm = gradient <= np.median(gradient)
    # E|L * n| = 6 sigma sqrt(2 / pi): the kernel's squares sum to 36.
    return float(np.sqrt(np.pi / 2) * response[calm].mean() / 6)


def exposure(gray: np.ndarray) -> float:
    """1 minus the share of crushed (0 to 2) or blown (253 to 255) pixels over 25%, at least 0."""
    clipped = float(((gray <= 2) | (gray >= 253)).mean())
    return max(0.0, 1.0 - clipped / _CLIPPED_SHARE_BAD)


def colourfulness_index(pixels: np.ndarray) -> float:
    """Hasler and Suesstrunk's M3 (SPIE 2003, eq. 8): 0 gray, above 100 extremely colourful.

    M = sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), rg = R - G,
    yb = (R + G) / 2 - B.

    Args:
        pixels: (H, W, 3) uint8, RGB.
    """
    colours = opponent_colours(pixels)
    spread = np.sqrt(colours.red_green_variance + colours.yellow_blue_variance)
    centre = np.hypot(colours.red_green_mean, colours.yellow_blue_mean)
    return float(spread + 0.3 * centre)


def rms_contrast(gray: np.ndarray) -> float:
    """Standard deviation of gray / 255 (Peli, JOSA A 1990): 0 to 0.5."""
    return float(gray.std() / 255)


def edge_compactness(gray: np.ndarray) -> float:
    """1 minus the area that holds most edges (Ke, Tang and Jing, CVPR 2006, section 4.1).

    Professional photographs keep their edges on a subject; snapshots have them everywhere. The map
    is 100x100, as there; its box holds 98% of the edge energy along each axis.

    Args:
        gray: (H, W) uint8.

    Returns:
        0 (edges everywhere) to 1; 0 without any edge.
    """
    edges = np.abs(cv2.Laplacian(gray, cv2.CV_32F))
    small = cv2.resize(edges, (_EDGE_MAP_PX, _EDGE_MAP_PX), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float64)
    if small.sum() == 0:
        return 0.0

    def extent(profile: np.ndarray) -> float:
        cumulative = np.cumsum(profile) / profile.sum()
        tail = (1 - _EDGE_ENERGY_SHARE) / 2
        inside = (cumulative >= tail) & (cumulative - profile / profile.sum() <= 1 - tail)
        return float(inside.mean())

    return 1.0 - extent(small.sum(axis=0)) * extent(small.sum(axis=1))


def classical_scores(pixels: np.ndarray) -> dict[str, float]:
    """All terms and the two scores of one picture.

    quality_score: geometric mean of sharpness, cleanness = exp(-sigma / 10) and exposure, since one
    bad term spoils a photograph. aesthetic: arithmetic mean of colourfulness M / (M + 40), contrast
    min(1, rms / 0.3) and edge compactness, since they trade off.

    Args:
        pixels: (H, W, 3) uint8, RGB, edges at least 3.

    Returns:
        0 to 1 each.
    """
    gray = grayscale(pixels)
    index = colourfulness_index(pixels)
    terms = {
        "sharpness": sharpness(gray),
        "cleanness": float(np.exp(-noise_sigma(gray) / _NOISE_SIGMA_SCALE)),
        "exposure": exposure(gray),
        "colourfulness": index / (index + _COLOURFULNESS_HALF),
        "contrast": min(1.0, rms_contrast(gray) / _CONTRAST_FULL),
        "edge_compactness": edge_compactness(gray),
    }
    quality = (terms["sharpness"] * terms["cleanness"] * terms["exposure"]) ** (1 / 3)
    aesthetic = (terms["colourfulness"] + terms["contrast"] + terms["edge_compactness"]) / 3
    return {"quality_score": quality, "aesthetic": aesthetic, **terms}


def score_derivative(derivative: Derivative) -> dict[str, Any]:
    """A row of `QUALITY_SCHEMA`; an image below 3 pixels an edge has null scores and an error."""
    pixels = decode_rgb(derivative.jpeg).pixels
    if min(pixels.shape[:2]) < 3:
        return {"error": f"{derivative.height}x{derivative.width}: too small to be scored"}
    return {
        **classical_scores(pixels),
        "quality_scorer": QUALITY_SCORER,
        "aesthetic_scorer": AESTHETIC_SCORER,
    }


def open_scorer(job: ScoringJob, kind: Kind) -> DerivativeScorer:
    """Both kinds from one look at each picture, so that `kind` makes no difference."""
    return DerivativeScorer(score_derivative, QUALITY_SCHEMA, EngineLimits.of(job.settings))
