"""Weight-free metrics of one image in groups that share a pass over its pixels.

The same numbers as `texture.texture_metrics`, split so that a caller computes what it lacks only.
"""

from __future__ import annotations

import numpy as np

from components.images.arrays import ImageArray
from components.metrics.native.fidelity import (
    MS_SSIM_MIN_PX,
    SSIM_WINDOW_PX,
    ms_ssim,
    nmse,
    psnr_db,
    ssim,
)
from components.metrics.native.texture import FLAT_PATCH_PX, colourfulness
from components.signals.appearance import laplacian_variance
from components.signals.flat_regions import grayscale
from components.signals.fused_texture import fused_texture
from components.signals.glcm import glcm_measures


def _check(rgb: ImageArray) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"rgb must be uint8 (H, W, 3), got {rgb.dtype} {rgb.shape}")


def fused_metrics(rgb: ImageArray) -> dict[str, float | None]:
    """Entropy and flat fraction in one pass over the pixels (the corpus's kernel, same bits).

    Args:
        rgb: uint8 (H, W, 3).
    """
    _check(rgb)
    # Without a full patch the kernel says 0.0, the corpus rule's "nothing is flat". As a metric
    # that would read as detail everywhere, so it becomes None.
    measured = fused_texture(rgb, patch_px=FLAT_PATCH_PX)
    has_patch = min(rgb.shape[:2]) >= FLAT_PATCH_PX
    return {
        "entropy_bits": measured.entropy_bits,
        "flat_fraction": measured.flat_fraction if has_patch else None,
    }


def glcm_metrics(rgb: ImageArray) -> dict[str, float | None]:
    """Diffusion-4K's GLCM score and the textbook entropy; None without a full 64 px patch.

    Args:
        rgb: uint8 (H, W, 3).
    """
    _check(rgb)
    measured = glcm_measures(grayscale(rgb))
    score, bits = (None, None) if measured is None else measured
    # Both come out of one count of pairs; a caller that wants one gets the other for nothing.
    return {"glcm_score": score, "glcm_entropy_bits": bits}


def sharpness_metric(rgb: ImageArray) -> dict[str, float | None]:
    """Variance of the Laplacian.

    Args:
        rgb: uint8 (H, W, 3), both edges at least 3 px.
    """
    _check(rgb)
    # Complete neighbourhoods: a reflected border would be detail that is not there.
    return {"laplacian_variance": laplacian_variance(grayscale(rgb), borders=False)}


def colourfulness_metric(rgb: ImageArray) -> dict[str, float | None]:
    """Spread and mean of the opponent colours.

    Args:
        rgb: uint8 (H, W, 3).
    """
    _check(rgb)
    return {"colourfulness": colourfulness(rgb)}


def pair_metric(metric_id: str, reference: ImageArray, image: ImageArray) -> float | None:
    """One of PSNR, SSIM, NMSE and MS-SSIM; None where its windows do not fit.

    Each on its own: SSIM and MS-SSIM take seconds at 4096 px, the other two a tenth of one.

    Args:
        metric_id: psnr_db, nmse, ssim or ms_ssim.
        reference: uint8 (H, W, 3).
        image: uint8 (H, W, 3).

    Raises:
        ValueError: different shapes.
    """
    if metric_id == "psnr_db":
        return psnr_db(reference, image)
    if metric_id == "nmse":
        return nmse(reference, image)
    edge = min(reference.shape[:2])
    if metric_id == "ssim":
        return ssim(reference, image) if edge >= SSIM_WINDOW_PX else None
    return ms_ssim(reference, image) if edge >= MS_SSIM_MIN_PX else None
