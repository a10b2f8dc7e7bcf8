"""Frontal faces by scikit-image's cascade of local binary patterns, looked for in two passes.

A scan of every position at full size costs five times the signals pass of a small photograph. So a
picture of half the size is scanned at every second position, and whatever one window there takes
for a face is scanned again at full size, every position, by the rule that decides: eight windows
must agree (the library's four find faces in leaves and tiles).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import cv2
import numpy as np

from components.signals.flat_regions import grayscale

FACE_SCORER = "skimage-lbp-frontal-face-v2"

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels."""

MIN_FACE_PX = 40

# What decides: 20% steps in scale, every position.
_SCALE_FACTOR, _STEP_RATIO, _MIN_NEIGHBOURS = 1.2, 1.0, 8
# What proposes, on half the size: finer scales make up for coarser positions, one window is enough,
# and the smallest is the cascade's own window.
_COARSE_SCALE_FACTOR, _COARSE_STEP_RATIO, _COARSE_NEIGHBOURS, _WINDOW_PX = 1.1, 2.0, 1, 24
# A proposal is looked at with half its size around it, for faces within half its size of it.
_MARGIN = 0.5
_SIZE_RATIO = 1.5


@cache
def _cascade() -> Any:
    """The cascade, loaded once per process."""
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    return Cascade(lbp_frontal_face_cascade_filename())


def _scan(
    gray: np.ndarray, smallest: int, largest: int, scale_factor: float, step: float, neighbours: int
) -> list[Box]:
    largest = min(largest, *gray.shape)
    if largest < smallest:
        return []
    found = _cascade().detect_multi_scale(
        img=np.ascontiguousarray(gray),
        scale_factor=scale_factor,
        step_ratio=step,
        min_size=(smallest, smallest),
        max_size=(largest, largest),
        min_neighbor_number=neighbours,
    )
    return [
        (box["r"], box["c"], box["r"] + box["height"], box["c"] + box["width"]) for box in found
    ]


def scan_everywhere(gray: np.ndarray) -> list[Box]:
    """Faces of `MIN_FACE_PX` and more by the rule that decides, wherever they are.

    Args:
        gray: (H, W) uint8.
    """
    edge = min(gray.shape)
    return _scan(gray, MIN_FACE_PX, edge, _SCALE_FACTOR, _STEP_RATIO, _MIN_NEIGHBOURS)


def _proposals(gray: np.ndarray) -> list[Box]:
    """Where a face may be, in pixels of `gray`."""
    height, width = gray.shape
    if min(height, width) < 2 * _WINDOW_PX:
        return []
    half = cv2.resize(gray, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    scan = (_COARSE_SCALE_FACTOR, _COARSE_STEP_RATIO, _COARSE_NEIGHBOURS)
    found = _scan(half, _WINDOW_PX, min(half.shape), *scan)
    return [(2 * top, 2 * left, 2 * bottom, 2 * right) for top, left, bottom, right in found]


def _holds_centre(box: Box, other: Box) -> bool:
    row, column = (other[0] + other[2]) / 2, (other[1] + other[3]) / 2
    return box[0] <= row < box[2] and box[1] <= column < box[3]


def find_faces(pixels: np.ndarray) -> list[Box]:
    """Frontal faces, from top to bottom.

    Args:
        pixels: (H, W, 3) uint8, RGB.
    """
    gray = grayscale(pixels)
    found: list[Box] = []
    for top, left, bottom, right in _proposals(gray):
        size = bottom - top
        margin = round(_MARGIN * size)
        row, column = max(top - margin, 0), max(left - margin, 0)
        part = gray[row : bottom + margin, column : right + margin]
        smallest = max(MIN_FACE_PX, round(size / _SIZE_RATIO))
        largest = round(size * _SIZE_RATIO)
        rule = (_SCALE_FACTOR, _STEP_RATIO, _MIN_NEIGHBOURS)
        for box in _scan(part, smallest, largest, *rule):
            face = (box[0] + row, box[1] + column, box[2] + row, box[3] + column)
            # Neighbouring proposals find the same face.
            if not any(_holds_centre(other, face) for other in found):
                found.append(face)
    return sorted(found)
