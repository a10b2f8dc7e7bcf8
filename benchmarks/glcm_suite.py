"""GLCM score of a suite of 4096 x 4096 images on one core, against Diffusion-4K's own way.

    python benchmarks/glcm_suite.py [--images 16] [--strips 1] [--whole 0]

Images are synthetic and seeded: noise at four scales whose share differs from image to image, so
that patches range from almost flat to busy. Of each image the kernel measures all 4,096 patches.
The reference (skimage's graycomatrix and shannon_entropy per patch) takes about a minute for one,
so it measures `--strips` rows of 64 patches of each image, and `--whole` images entirely. Both take
turns within each image; the kernel also measures the strips, and the scores must agree. Times are
CPU seconds of the process, so that other work on the machine disturbs ratios little.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from corpus_signals import cpu_seconds, glcm_reference
from verdicts import Verdict, conclude

from components.signals.glcm import PATCH_PX, glcm_measures

EDGE_PX = 4096


def synthetic(number: int) -> np.ndarray:
    """(4096, 4096) uint8, the same for the same number."""
    rng = np.random.default_rng(number)
    image = np.zeros((EDGE_PX, EDGE_PX), np.float32)
    for cells in (16, 128, 1024, EDGE_PX):
        noise = rng.standard_normal((cells, cells), dtype=np.float32)
        share = float(rng.uniform(0.0, 40.0))
        image += share * cv2.resize(noise, (EDGE_PX, EDGE_PX), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + 128.0, 0, 255).astype(np.uint8)


def main() -> int:
    """Measure and print the ratio; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--strips", type=int, default=1, help="of 64 patches, per image")
    parser.add_argument("--whole", type=int, default=0, help="images that the reference measures")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    # Compiles, or loads what was compiled before.
    prepared, _ = cpu_seconds(lambda: glcm_measures(np.zeros((PATCH_PX, PATCH_PX), np.uint8)))
    per_image = (EDGE_PX // PATCH_PX) ** 2
    ours = reference = 0.0
    reference_patches = 0
    ratios = []
    for number in range(options.images):
        gray = synthetic(number)
        seconds, measured = cpu_seconds(lambda gray=gray: glcm_measures(gray))
        ours += seconds
        own_s, theirs_s, theirs = seconds / per_image, 0.0, 0
        rng = np.random.default_rng(10_000 + number)
        tops = rng.choice(EDGE_PX // PATCH_PX, options.strips, replace=False) * PATCH_PX
        strips = [np.ascontiguousarray(gray[top : top + PATCH_PX]) for top in tops]
        if number < options.whole:
            strips = [gray]
        for strip in strips:
            seconds, score = cpu_seconds(lambda strip=strip: glcm_reference(strip))
            reference += seconds
            reference_patches += strip.size // PATCH_PX**2
            theirs_s += seconds
            theirs += strip.size // PATCH_PX**2
            # The kernel takes the top-left square, so a strip is handed over patch by patch.
            pieces = [gray] if strip is gray else np.split(strip, EDGE_PX // PATCH_PX, axis=1)
            own = float(np.mean([glcm_measures(np.ascontiguousarray(p))[0] for p in pieces]))
            assert abs(own - score) < 1e-12, (number, own, score)
        ratios.append(theirs_s / theirs / own_s)
        print(f"image {number:2}: score {measured[0]:.4f}", flush=True)
    own_ms = ours / (options.images * per_image) * 1e3
    reference_ms = reference / reference_patches * 1e3
    print(f"load average {os.getloadavg()[0]:.1f}; kernel ready after {prepared:.1f} CPU s")
    print(f"kernel: {options.images} images, {ours:.1f} CPU s, {own_ms:.3f} ms per patch")
    print(f"reference: {reference_patches} patches, {reference:.1f} CPU s, {reference_ms:.3f} ms")
    verdict = Verdict("GLCM: reference / kernel, per patch", tuple(ratios), 8.0, at_most=False)
    return conclude([verdict])


if __name__ == "__main__":
    sys.exit(main())
