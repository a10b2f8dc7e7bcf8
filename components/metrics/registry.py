"""Every metric there is: one row per family, in the order of tables, from modules of `catalog`.

A new metric is a module there and a row here. Rows are data: the modules import nothing heavy, and
`open_metric` looks at the disk before it calls an opener, so missing weights are known in
milliseconds.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from components.metrics.catalog import (
    artimuse,
    clip,
    dinov2,
    fidelity,
    hpsv3,
    inception,
    lattice,
    lpips,
    musiq,
    niqe,
    piqe,
    qalign,
    texture,
)
from components.metrics.metric import Metric
from components.metrics.metric_card import MetricFamily
from components.metrics.weight_files import trusted_files

METRICS: tuple[MetricFamily, ...] = (
    fidelity.PSNR,
    fidelity.SSIM,
    fidelity.MS_SSIM,
    fidelity.NMSE,
    texture.GLCM,
    texture.COMPRESSION,
    texture.TEXTURE,
    texture.SHARPNESS,
    texture.COLOURFULNESS,
    lattice.LATTICE,
    piqe.PIQE,
    niqe.NIQE,
    lpips.LPIPS,
    lpips.LPIPS_ALEX,
    inception.RFID,
    inception.FID_KID,
    inception.FID_FITTED,
    inception.FID_EXTRAPOLATED,
    inception.FID_CLEAN,
    inception.PATCH_FID_KID,
    dinov2.FD_DINOV2,
    hpsv3.HPSV3,
    clip.PICKSCORE,
    artimuse.ARTIMUSE,
    clip.CLIP_SCORE,
    clip.CLIP_SCORE_B16,
    qalign.QALIGN,
    musiq.MUSIQ,
    clip.LAION_AESTHETICS,
)


def family_of(metric_id: str) -> MetricFamily:
    """The family that yields a metric.

    Raises:
        ValueError: no such metric; the message lists the known ids.
    """
    for family in METRICS:
        if any(card.id == metric_id for card in family.cards):
            return family
    known = [card.id for family in METRICS for card in family.cards]
    close = difflib.get_close_matches(metric_id, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"unknown metric '{metric_id}'{hint}; known: {', '.join(known)}")


def open_metric(metric_id: str, weights_dir: Path, device: str = "cpu") -> Metric:
    """The metric that yields `metric_id`, perhaps with others: see its `ids`.

    Args:
        metric_id: id of a card.
        weights_dir: the repository's `weights/` folder.
        device: where a network runs.

    Raises:
        ValueError: no such metric.
        WeightsMissing: at once, before anything heavy is imported.
    """
    family = family_of(metric_id)
    first = family.cards[0]
    if first.weights is None or not family.reads_weights:
        return family.opener((), "", device)
    files, digest = trusted_files(first, weights_dir)
    return family.opener(files, digest, device)
