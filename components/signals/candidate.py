"""Classical signals of a photograph: integrity, entropy, flatness, texture, hash, compression.

`measure_image` is the stable interface behind `ultraflux measure`; `measure_candidate` is what the
signals stage runs for every candidate, together with a small derivative for later stages.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from components.images.decoding import (
    MAX_MEGAPIXELS,
    ImageUndecodable,
    decode_both,
    read_as_stored,
)
from components.images.image_files import source_bytes
from components.images.original_lookup import Original
from components.images.scratch import Scratch
from components.signals.compression import jpeg95_ratio
from components.signals.flat_regions import grayscale
from components.signals.fused_texture import FusedTexture, fused_texture
from components.signals.glcm import glcm_measures
from components.signals.jpeg_quality import jpeg_quality
from components.signals.pdq import pdq
from components.signals.shrinking import box_reduced

_DERIVATIVE_QUALITY = 90

SIGNALS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        # As seen.
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes_per_pixel", pa.float64()),
        ("integrity", pa.string()),
        ("flat_fraction", pa.float64()),
        ("entropy_bits", pa.float64()),
        ("glcm_score", pa.float64()),
        ("glcm_entropy_bits", pa.float64()),
        ("jpeg_quality", pa.int32()),
        ("pdq_hash", pa.string()),
        ("pdq_quality", pa.int32()),
        ("alpha_fraction", pa.float64()),
        ("decode_note", pa.string()),
        ("error", pa.string()),
    ]
)
DERIVATIVES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        # Of the original as seen, so that boxes found on the derivative can be scaled back.
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("jpeg", pa.binary()),
    ]
)
CANDIDATE_SCHEMA = pa.schema([*SIGNALS_SCHEMA, DERIVATIVES_SCHEMA.field("jpeg")])
"""What one worker returns: both tables in one row."""

UNREAD = "cannot read"
"""What `integrity` starts with when not even the bytes could be had."""

_MEASURES = ("entropy_bits", "flat_fraction", "glcm_score", "glcm_entropy_bits", "jpeg95_ratio")

_SEEN = (
    "upright_width",
    "upright_height",
    "orientation",
    "color_space",
    "bit_depth",
    "alpha_fraction",
)


@dataclass(frozen=True)
class Candidate:
    """One file to measure, with the settings that matter (picklable)."""

    path: Path | Original
    patch_px: int
    flat_variance: float
    derivative_px: int
    max_megapixels: float
    glcm: bool = True
    """The co-occurrence measures take longer than everything else together."""


_per_thread = threading.local()


def _scratch() -> Scratch:
    """This thread's decode and gray buffers; nothing that a function here returns is a view."""
    # Never one for the process: another thread would decode into it while this one measures.
    if not hasattr(_per_thread, "scratch"):
        _per_thread.scratch = Scratch()
    scratch: Scratch = _per_thread.scratch
    return scratch


def derivative_factor(height: int, width: int, long_edge_px: int) -> int:
    """Smallest whole number that brings an image to a long edge of at most `long_edge_px`."""
    # Rounded up, or an edge just above the limit would stay as it is.
    return max(1, -(-max(height, width) // long_edge_px))


def _encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_DERIVATIVE_QUALITY)
    return buffer.getvalue()


def derivative_jpeg(pixels: np.ndarray, long_edge_px: int) -> bytes:
    """A small JPEG (quality 90) for model scorers and reports; never enlarged.

    Means of whole blocks, so a 4K image ends between 4/5 of the edge and the edge: every picture
    keeps its aspect ratio, and nothing is resampled twice before a scorer's own resize.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        long_edge_px: at most this in the result.
    """
    height, width = pixels.shape[:2]
    return _encoded(box_reduced(pixels, derivative_factor(height, width, long_edge_px)))


def _texture(pixels: np.ndarray, candidate: Candidate) -> FusedTexture:
    height, width = pixels.shape[:2]
    return fused_texture(
        pixels,
        patch_px=candidate.patch_px,
        flat_variance=candidate.flat_variance,
        reduced_by=derivative_factor(height, width, candidate.derivative_px),
        scratch=_scratch(),
    )


def measure_candidate(candidate: Candidate) -> dict[str, Any]:
    """Signals and derivative of one file from one decode; what is broken is said in `integrity`.

    Returns:
        a row of `CANDIDATE_SCHEMA` without image_id.
    """
    try:
        data = source_bytes(candidate.path)
        decoded, stored = decode_both(
            data, max_megapixels=candidate.max_megapixels, scratch=_scratch()
        )
    except OSError as problem:
        # Without the path that the full text holds: rows must not depend on the machine.
        return {"integrity": f"{UNREAD}: {problem.strerror}"}
    except ImageUndecodable as problem:
        return {"integrity": str(problem)}
    # The one pass over the pixels; all that follows reads its gray plane or its small copy. The
    # published signals are of the file as stored.
    texture = _texture(stored, candidate)
    # `texture.gray` is scratch: read to the end here, and nothing returned points into it.
    glcm = glcm_measures(texture.gray) if candidate.glcm else None
    score, entropy = glcm or (None, None)
    height, width = decoded.pixels.shape[:2]
    seen_gray, reduced = texture.gray, texture.reduced
    if decoded.pixels is not stored:
        # Turned, of another colour space or transparent: these two are of what a viewer shows.
        seen_gray = grayscale(decoded.pixels)
        factor = derivative_factor(height, width, candidate.derivative_px)
        reduced = box_reduced(decoded.pixels, factor)
    hash_hex, hash_quality = pdq(seen_gray) or (None, None)
    return {
        "width": width,
        "height": height,
        "bytes_per_pixel": len(data) / (height * width),
        "integrity": decoded.integrity,
        "flat_fraction": texture.flat_fraction,
        "entropy_bits": texture.entropy_bits,
        "glcm_score": score,
        "glcm_entropy_bits": entropy,
        # From the file's own tables, so null for other formats.
        "jpeg_quality": jpeg_quality(decoded.quantization) if decoded.quantization else None,
        "pdq_hash": hash_hex,
        "pdq_quality": hash_quality,
        "alpha_fraction": decoded.alpha_fraction,
        "decode_note": decoded.note,
        # Of the same decode, for the scorers: they need not open the original again.
        "jpeg": _encoded(reduced),
    }


def kernels_digest() -> str:
    """Hash of the compiled loops' source, without the second that importing them takes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*_kernels.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def prepare_worker() -> None:
    """Load or compile every kernel, so that no item waits for a compiler or its memory."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    gray = np.ascontiguousarray(noise[..., 0])
    # Every branch that a photograph can take is taken once: a kernel compiled inside an item would
    # count against its time and memory.
    steps: list[Callable[[], object]] = [
        lambda: fused_texture(noise, patch_px=8, reduced_by=3),
        lambda: glcm_measures(gray),
        # Large enough for `pdq` to shrink by 3: a factor of 2 is OpenCV's, and would leave
        # `box_means` uncompiled.
        lambda: pdq(np.tile(gray, (8, 8))),
    ]
    # Each kernel is compiled by one process; those that start together begin with different ones.
    for step in steps[:: 1 if os.getpid() % 2 else -1]:
        step()
    _encoded(noise)


# The pool calls this in every worker before it says that it is ready.
measure_candidate.prepare_worker = prepare_worker  # type: ignore[attr-defined]


def measure_image(path: Path, *, max_megapixels: float = MAX_MEGAPIXELS) -> dict[str, Any]:
    """All weight-free measures of one file, with the paper's thresholds for flatness.

    Returns:
        path, width, height (pixels as stored), entropy_bits (0 to 8), flat_fraction (0 to 1),
        glcm_score, glcm_entropy_bits (0 to 12), jpeg95_ratio (above 1 for nearly every picture),
        all of the pixels as stored; upright_width, upright_height (as seen), orientation (1 to 8),
        color_space, bit_depth, alpha_fraction (mean transparency). Not measurable: null, and the
        key `error` says why.
    """
    row: dict[str, Any] = {"path": str(path), "width": None, "height": None}
    # Every key from the start: the line of a file that fails has the same ones.
    row |= dict.fromkeys((*_MEASURES, *_SEEN))
    try:
        decoded = read_as_stored(path, max_megapixels=max_megapixels)
    except ImageUndecodable as problem:
        return row | {"error": str(problem)}
    texture = fused_texture(decoded.pixels)
    header = decoded.header
    row |= {"width": header.stored_width, "height": header.stored_height}
    row |= {"entropy_bits": texture.entropy_bits, "flat_fraction": texture.flat_fraction}
    row |= {"upright_width": header.width, "upright_height": header.height}
    row |= {"orientation": header.orientation, "color_space": header.color_space}
    row |= {"bit_depth": header.bit_depth, "alpha_fraction": decoded.alpha_fraction}
    # A damaged file is measured as far as it decodes, and says so.
    errors = [] if decoded.integrity == "ok" else [f"damaged: {decoded.integrity}"]
    glcm = glcm_measures(texture.gray)
    if glcm is None:
        errors.append("GLCM: no 64x64 patch fits")
    else:
        row["glcm_score"], row["glcm_entropy_bits"] = glcm
    try:
        row["jpeg95_ratio"] = jpeg95_ratio([decoded.pixels])
    except ValueError as problem:
        errors.append(str(problem))
    return row | {"error": "; ".join(errors)} if errors else row
