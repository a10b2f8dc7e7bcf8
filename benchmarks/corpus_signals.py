"""Cost of the CPU signals on one core, against the decode floor and the reference implementation.

    python benchmarks/corpus_signals.py [FOLDER] [--rounds 2] [--limit N] [--whole-glcm]

Every JPEG of the folder goes through all variants in turn; the fastest round of each file counts
and times are CPU seconds of the process, so that other work on the machine disturbs ratios little.
The ratios are over plain photographs (`is_plain`: both pixel policies are one array); what one with
a profile, another turn or other bands costs beside them is a table of its own. Exit code 1 beyond a
target.

- floor: simplejpeg into one reused buffer, bytes in memory; nothing decodes these pixels faster
  here.
- pass: one row of the signals stage, all of it but GLCM: file read, strict decode, header, JPEG
  quality, entropy, flat fraction, PDQ, and the derivative as a JPEG.
- reference: the same row as one writes it first: PIL, OpenCV gray, np.histogram and scipy entropy,
  float64 Sobel per patch, PDQ of the area-averaged RGB image, PIL's Lanczos for the derivative.
  "with reduce" has PIL's box reduction instead, which is what the pass computes.
- texture, texture reference: of both decode, entropy and flat fraction alone.
- GLCM: a centre square of each file, or with --whole-glcm the whole (seconds each).
"""

from __future__ import annotations

import argparse
import io
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pdqhash
import simplejpeg
from PIL import Image
from scipy.stats import entropy as scipy_entropy
from skimage.feature import graycomatrix
from skimage.measure import shannon_entropy
from verdicts import Verdict, conclude

from components.images.decoding import decode_both, decode_rgb, is_plain, read_header
from components.images.scratch import Scratch
from components.signals.candidate import (
    Candidate,
    derivative_factor,
    measure_candidate,
    prepare_worker,
)
from components.signals.flat_regions import grayscale, sobel_variance
from components.signals.fused_texture import fused_texture
from components.signals.glcm import glcm_measures
from components.signals.jpeg_quality import jpeg_quality

ROOT = Path(__file__).resolve().parents[1]
PATCH_PX = 240
FLAT_VARIANCE = 800.0
DERIVATIVE_PX = 1024
PDQ_SAME_BITS = 10
"""Of 256: what hashing gray instead of RGB may change; duplicates are within 31."""
GLCM_EDGE_PX = 256
"""16 patches per file."""
TARGETS = {("pass", "floor"): 1.25, ("reference", "pass"): 5.0, ("GLCM reference", "GLCM"): 8.0}
"""At most the first of these times its floor; at least the others."""


def texture_reference(rgb: np.ndarray) -> tuple[float, float]:
    """(entropy, flat fraction) as the released tool computes them."""
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    histogram = np.histogram(gray, bins=256, range=(0, 256))[0]
    patches = [
        gray[top : top + PATCH_PX, left : left + PATCH_PX]
        for top in range(0, gray.shape[0] - PATCH_PX + 1, PATCH_PX)
        for left in range(0, gray.shape[1] - PATCH_PX + 1, PATCH_PX)
    ]
    flat = [sobel_variance(patch) < FLAT_VARIANCE for patch in patches]
    entropy = float(scipy_entropy(histogram[histogram > 0], base=2))
    return entropy, sum(flat) / len(flat) if flat else 0.0


def rgb_reference(data: bytes) -> np.ndarray:
    """The released tool's decode."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def shrunk_size(height: int, width: int, long_edge_px: int) -> tuple[int, int]:
    """(width, height), never enlarged."""
    scale = min(1.0, long_edge_px / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


def row_reference(path: Path, *, lanczos: bool) -> dict[str, Any]:
    """A row of the signals stage without GLCM, one obvious step after another."""
    data = path.read_bytes()
    image = Image.open(io.BytesIO(data))
    picture = image.convert("RGB")
    rgb = np.asarray(picture)
    height, width = rgb.shape[:2]
    entropy, flat = texture_reference(rgb)
    small = cv2.resize(rgb, shrunk_size(height, width, 512), interpolation=cv2.INTER_AREA)
    bits, quality = pdqhash.compute(small)
    if lanczos:
        size = shrunk_size(height, width, DERIVATIVE_PX)
        derivative = picture.resize(size, Image.Resampling.LANCZOS)
    else:
        derivative = picture.reduce(derivative_factor(height, width, DERIVATIVE_PX))
    jpeg = io.BytesIO()
    derivative.save(jpeg, "JPEG", quality=90)
    return {
        "width": width,
        "height": height,
        "bytes_per_pixel": len(data) / (height * width),
        "integrity": "ok",
        "flat_fraction": flat,
        "entropy_bits": entropy,
        "jpeg_quality": jpeg_quality(image.quantization),  # type: ignore[attr-defined]
        "pdq_hash": np.packbits(bits.astype(np.uint8)).tobytes().hex(),
        "pdq_quality": int(quality),
        "jpeg": jpeg.getvalue(),
    }


def assert_same_row(row: dict[str, Any], reference: dict[str, Any]) -> None:
    """Equal but for the hash, which is taken of gray, and the pixels of the derivative."""
    different = {key for key in reference if row[key] != reference[key]}
    assert different <= {"pdq_hash", "pdq_quality", "jpeg"}, different
    distance = (int(row["pdq_hash"], 16) ^ int(reference["pdq_hash"], 16)).bit_count()
    assert distance <= PDQ_SAME_BITS or row["pdq_quality"] < 50, distance


def glcm_reference(gray: np.ndarray) -> float:
    """Diffusion-4K's script on all full 64x64 patches of a square."""
    levels = gray >> 2
    scores = []
    for top in range(0, gray.shape[0] - 63, 64):
        for left in range(0, gray.shape[1] - 63, 64):
            matrices = graycomatrix(
                levels[top : top + 64, left : left + 64],
                distances=[1, 2, 3, 4],
                angles=[0, np.pi / 4, np.pi / 2, 3 * np.pi / 4],
                levels=64,
                symmetric=False,
                normed=True,
            )
            scores.append(shannon_entropy(matrices))
    return float(np.mean(scores))


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call and what it returned."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def measure_files(
    paths: list[Path], rounds: int, glcm_px: int
) -> tuple[dict[str, float], list[dict[str, float]], float]:
    """CPU seconds of every variant, and the megapixels; results are compared on the way.

    Returns:
        seconds by variant, of each file's fastest round; the same of every round; megapixels.
    """
    scratch = Scratch()
    buffer = np.empty(0, np.uint8)
    totals: dict[str, float] = {}
    by_round: list[dict[str, float]] = [{} for _ in range(rounds)]
    megapixels = 0.0
    for path in paths:
        data = path.read_bytes()
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        megapixels += height * width / 1e6
        if buffer.size < height * width * 3:
            buffer = np.empty(height * width * 3, np.uint8)
        gray = grayscale(decode_rgb(data).pixels)
        edge = min(glcm_px, *gray.shape)
        top, left = (gray.shape[0] - edge) // 2, (gray.shape[1] - edge) // 2
        square = np.ascontiguousarray(gray[top : top + edge, left : left + edge])

        def texture(data: bytes = data) -> tuple[float, float]:
            # Of a photograph with a profile the published signals see what is stored.
            _, stored = decode_both(data, scratch=scratch)
            measured = fused_texture(stored, scratch=scratch)
            return measured.entropy_bits, measured.flat_fraction

        def one_pass(glcm: bool, path: Path = path) -> dict[str, Any]:
            return measure_candidate(
                Candidate(path, PATCH_PX, FLAT_VARIANCE, DERIVATIVE_PX, 400.0, glcm=glcm)
            )

        variants: dict[str, Callable[[], Any]] = {
            "floor": lambda data=data, into=buffer: simplejpeg.decode_jpeg(
                data, "RGB", buffer=into
            ),
            "texture": texture,
            "pass": lambda one_pass=one_pass: one_pass(False),
            "pass with GLCM": lambda one_pass=one_pass: one_pass(True),
            "texture reference": lambda data=data: texture_reference(rgb_reference(data)),
            "reference": lambda path=path: row_reference(path, lanczos=True),
            "reference with reduce": lambda path=path: row_reference(path, lanczos=False),
            "GLCM": lambda square=square: glcm_measures(square),
            "GLCM reference": lambda square=square: glcm_reference(square),
        }
        best = dict.fromkeys(variants, float("inf"))
        results: dict[str, Any] = {}
        for turn in by_round:
            for name, variant in variants.items():
                seconds, results[name] = cpu_seconds(variant)
                best[name] = min(best[name], seconds)
                turn[name] = turn.get(name, 0.0) + seconds
        assert results["texture"] == results["texture reference"], path
        assert_same_row(results["pass"], results["reference"])
        assert_same_row(results["pass with GLCM"], results["reference with reduce"])
        assert abs(results["GLCM"][0] - results["GLCM reference"]) < 1e-12, path
        for name, seconds in best.items():
            totals[name] = totals.get(name, 0.0) + seconds
    return totals, by_round, megapixels


def print_variants(title: str, paths: list[Path], totals: dict[str, float], mp: float) -> None:
    """One row for each variant over the same files."""
    print(f"{title}: {len(paths)} JPEGs, {mp:.0f} megapixels")
    print(f"{'variant':22} {'ms/image':>9} {'MP/s':>7} {'x floor':>8}")
    for name in (name for name in totals if not name.startswith("GLCM")):
        seconds = totals[name]
        print(
            f"{name:22} {seconds / len(paths) * 1e3:9.1f} {mp / seconds:7.0f} "
            f"{seconds / totals['floor']:8.2f}"
        )


def ratio(totals: dict[str, float], of: str, to: str) -> None:
    """Print how often one variant goes into another."""
    print(f"{of + ' / ' + to:40} {totals[of] / totals[to]:6.2f}")


def main() -> int:
    """Measure and print the tables; 1 beyond a target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "data" / "sample")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, help="first N files only")
    parser.add_argument("--whole-glcm", action="store_true", help="GLCM of whole photographs")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    paths = sorted(path for path in options.folder.iterdir() if path.suffix.lower() == ".jpg")
    paths = paths[: options.limit]
    plain = [path for path in paths if is_plain(read_header(path.read_bytes()))]
    others = [path for path in paths if path not in plain]
    if not plain:
        sys.exit(f"{options.folder}: no plain JPEG among {len(paths)}")
    started = time.perf_counter()
    prepare_worker()
    prepared = time.perf_counter() - started
    glcm_px = sys.maxsize if options.whole_glcm else GLCM_EDGE_PX
    print(f"{platform.machine()}, one core; kernels ready after {prepared:.1f} s, once per process")
    totals, by_round, megapixels = measure_files(plain, options.rounds, glcm_px)
    print_variants("plain photographs", plain, totals, megapixels)
    if others:
        found, _, theirs = measure_files(others, options.rounds, glcm_px)
        print_variants("others", others, found, theirs)
    ratio(totals, "reference with reduce", "pass")
    ratio(totals, "texture", "floor")
    ratio(totals, "texture reference", "texture")
    if options.whole_glcm:
        totals["reference with GLCM"] = totals["reference with reduce"] + totals["GLCM reference"]
        ratio(totals, "reference with GLCM", "pass with GLCM")
    return conclude(
        [
            Verdict(
                f"signals, plain photographs: {of} / {to}",
                tuple(turn[of] / turn[to] for turn in by_round),
                target,
                at_most=of == "pass",
            )
            for (of, to), target in TARGETS.items()
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
