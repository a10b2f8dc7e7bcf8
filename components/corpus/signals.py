"""Classical signals of a photograph: integrity, entropy, flatness, texture, compression.

`measure_image` is the stable interface behind `ultraflux measure`; `measure_candidate` is what the
signals stage runs for every candidate, together with a small derivative for later stages.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from components.corpus.compression import jpeg95_ratio
from components.corpus.decoding import MAX_MEGAPIXELS, ImageUndecodable, decode_rgb, read_rgb
from components.corpus.entropy import entropy_bits
from components.corpus.flat_regions import flat_fraction, grayscale
from components.corpus.glcm import glcm_measures

_DERIVATIVE_QUALITY = 90
# PIL shrinks by whole factors first while at least this many source pixels per target pixel stay:
# visually Lanczos, at a third of its time.
_REDUCING_GAP = 3.0

SIGNALS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes_per_pixel", pa.float64()),
        ("integrity", pa.string()),
        ("flat_fraction", pa.float64()),
        ("entropy_bits", pa.float64()),
        ("decode_note", pa.string()),
        ("error", pa.string()),
    ]
)
DERIVATIVES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        # Of the original, so that boxes found on the derivative can be scaled back.
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("jpeg", pa.binary()),
    ]
)
CANDIDATE_SCHEMA = pa.schema([*SIGNALS_SCHEMA, DERIVATIVES_SCHEMA.field("jpeg")])
"""What one worker returns: both tables in one row."""

_MEASURES = ("entropy_bits", "flat_fraction", "glcm_score", "glcm_entropy_bits", "jpeg95_ratio")


@dataclass(frozen=True)
class Candidate:
    """One file to measure, with the settings that matter (picklable)."""

    path: Path
    patch_px: int
    flat_variance: float
    derivative_px: int
    max_megapixels: float


def derivative_jpeg(pixels: np.ndarray, long_edge_px: int) -> bytes:
    """A small JPEG (quality 90) for model scorers and reports; never enlarged.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        long_edge_px: of the result.
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    scale = long_edge_px / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_DERIVATIVE_QUALITY)
    return buffer.getvalue()


def measure_candidate(candidate: Candidate) -> dict[str, Any]:
    """Signals and derivative of one file from one decode; what is broken is said in `integrity`.

    Returns:
        a row of `CANDIDATE_SCHEMA` without image_id.
    """
    try:
        data = candidate.path.read_bytes()
        decoded = decode_rgb(data, max_megapixels=candidate.max_megapixels)
    except OSError as problem:
        return {"integrity": f"cannot read: {problem.strerror}"}
    except ImageUndecodable as problem:
        return {"integrity": str(problem)}
    gray = grayscale(decoded.pixels)
    height, width = gray.shape
    return {
        "width": width,
        "height": height,
        "bytes_per_pixel": len(data) / (height * width),
        "integrity": decoded.integrity,
        "flat_fraction": flat_fraction(
            gray, patch_px=candidate.patch_px, flat_variance=candidate.flat_variance
        ),
        "entropy_bits": entropy_bits(gray),
        "decode_note": decoded.note,
        "jpeg": derivative_jpeg(decoded.pixels, candidate.derivative_px),
    }


def measure_image(path: Path, *, max_megapixels: float = MAX_MEGAPIXELS) -> dict[str, Any]:
    """All weight-free measures of one file, with the paper's thresholds for flatness.

    Returns:
        path, width, height (pixels, no EXIF rotation), entropy_bits (0 to 8), flat_fraction
        (0 to 1), glcm_score, glcm_entropy_bits (0 to 12), jpeg95_ratio (above 1 for nearly every
        picture). Not measurable: null, and the key `error` says why.
    """
    row: dict[str, Any] = {"path": str(path), "width": None, "height": None}
    row |= dict.fromkeys(_MEASURES)
    try:
        decoded = read_rgb(path, max_megapixels=max_megapixels)
    except ImageUndecodable as problem:
        return row | {"error": str(problem)}
    gray = grayscale(decoded.pixels)
    row |= {"width": decoded.header.width, "height": decoded.header.height}
    row |= {"entropy_bits": entropy_bits(gray), "flat_fraction": flat_fraction(gray)}
    errors = [] if decoded.integrity == "ok" else [f"damaged: {decoded.integrity}"]
    texture = glcm_measures(gray)
    if texture is None:
        errors.append("GLCM: no 64x64 patch fits")
    else:
        row["glcm_score"], row["glcm_entropy_bits"] = texture
    try:
        row["jpeg95_ratio"] = jpeg95_ratio([decoded.pixels])
    except ValueError as problem:
        errors.append(str(problem))
    return row | {"error": "; ".join(errors)} if errors else row
