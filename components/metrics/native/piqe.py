"""PIQE: the share of a picture's detailed blocks that look distorted; needs no weights.

Venkatanath et al. 2015, as MATLAB and pyiqa compute it; 0 to 100, lower is better.

Deviation: a picture whose edges are no multiples of 16 px is mirrored up to the next multiple, as
MATLAB does. pyiqa appends the remainder itself and drops what then fills no block; at multiples of
16 all three agree (tests/components/metrics/native/test_piqe.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from components.images.arrays import ImageArray
from components.metrics.native.natural_statistics import Plane, blocks, luma, normalised

BLOCK_PX = 16
SEGMENT_PX = 6
"""Length of a piece of a block's edge; a smooth one shows where blocks were compressed apart."""
ACTIVE_VARIANCE = 0.1
SMOOTH_DEVIATION = 0.1
# The two middle columns; without the second one's twin, as the released code deletes them in turn.
_CENTRE = [7, 8]
_SURROUND = [column for column in range(BLOCK_PX) if column not in (7, 9)]


def _has_smooth_edge(tiles: Plane) -> npt.NDArray[np.bool_]:
    """(N,): some piece of an edge of the block varies less than `SMOOTH_DEVIATION`."""
    edges = np.stack([tiles[:, 0], tiles[:, -1], tiles[:, :, 0], tiles[:, :, -1]], axis=1)
    # ddof=1 here and below: MATLAB divides by n - 1.
    deviations = sliding_window_view(edges, SEGMENT_PX, axis=2).std(axis=3, ddof=1)
    return (deviations < SMOOTH_DEVIATION).any(axis=(1, 2))


def _is_noisy(tiles: Plane, deviation: Plane) -> npt.NDArray[np.bool_]:
    """(N,): the block varies more than twice as much as its middle against its surround explains.

    Args:
        tiles: (N, 16, 16).
        deviation: (N,), of whole blocks.
    """
    centre = tiles[:, :, _CENTRE].std(axis=(1, 2), ddof=1)
    surround = tiles[:, :, _SURROUND].std(axis=(1, 2), ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A flat surround divides by 0: NaN becomes 0 and infinity the largest float, so that beta
        # stays a number.
        ratio = np.nan_to_num(centre / surround)
        beta = np.abs(deviation - ratio) / np.maximum(deviation, ratio)
    return deviation > 2 * beta


def piqe(rgb: ImageArray) -> float | None:
    """Score of a picture; None where it is black or smaller than a block.

    Args:
        rgb: uint8 (H, W, 3).
    """
    gray = luma(rgb)
    brightest = float(gray.max())
    if min(gray.shape) < BLOCK_PX or brightest == 0.0:
        return None
    # By the picture's own maximum, as released: a dark picture is judged as if it were bright.
    scaled = np.rint(255.0 * (gray / brightest))
    missing = [-length % BLOCK_PX for length in scaled.shape]
    padded = np.pad(scaled, [(0, length) for length in missing], mode="symmetric")
    tiles = blocks(normalised(padded), BLOCK_PX)
    variance = tiles.var(axis=(1, 2), ddof=1)
    active = variance > ACTIVE_VARIANCE
    # Blocks that vary little count more as compressed, those that vary much as noisy.
    artefacts = _has_smooth_edge(tiles) * (1 - variance)
    noise = _is_noisy(tiles, np.sqrt(variance)) * variance
    distortion = float((active * (artefacts + noise)).sum())
    # The constants decide for a picture without a detailed block: 100, the worst.
    return (distortion + 1.0) / (float(active.sum()) + 1.0) * 100.0
