"""What every metric without weights does under blur, JPEG, downsampling and a lattice.

    python benchmarks/metric_sensitivity.py [FOLDER]

Prints the mean over the folder's photographs (default: data/sample; their central 1024 px) as
they are and under each change, so that a reader sees which metrics notice it, and which way.
Metrics that see 224 to 448 px of a large picture cannot see most of these; their cards say what
reaches them.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from components.evaluation.suites.suites import WEIGHT_FREE_METRICS
from components.images.arrays import ImageArray
from components.images.decoding import read_rgb
from components.metrics.cards import card
from components.metrics.metric import ImageMetric, Picture
from components.metrics.native.native_metrics import pair_metric
from components.metrics.registry import open_metric

METRICS = (*WEIGHT_FREE_METRICS, "lattice_2px", "lattice_16px", "lattice_32px")
PAIR_METRICS = ("psnr_db", "ssim", "ms_ssim", "nmse")
LATTICE_LEVELS = 4.0
CROP_PX = 1024


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _half(image: Image.Image) -> Image.Image:
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.LANCZOS)


def _lattice(image: Image.Image, period: int) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    y, x = np.indices(pixels.shape[:2])
    grid = np.sin(2 * np.pi * x / period) + np.sin(2 * np.pi * y / period)
    added = pixels + LATTICE_LEVELS * grid[..., None]
    return Image.fromarray(np.clip(np.round(added), 0, 255).astype(np.uint8))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda image: image,
    "blur, radius 2": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "JPEG 90": lambda image: _jpeg(image, 90),
    "JPEG 30": lambda image: _jpeg(image, 30),
    "half size and back": _half,
    "lattice 16 px": lambda image: _lattice(image, 16),
    "lattice 32 px": lambda image: _lattice(image, 32),
}


def measured(original: ImageArray, changed: ImageArray) -> dict[str, float]:
    """Every number of one picture; what has none (too small) is left out."""
    values: dict[str, float | None] = {}
    for name in METRICS:
        if name not in values:
            metric = open_metric(name, Path("weights"))
            assert isinstance(metric, ImageMetric)
            values |= metric.measure(changed, Picture(Path(), ""))
    for name in PAIR_METRICS:
        values[name] = pair_metric(name, original, changed)
    return {name: value for name, value in values.items() if value is not None}


def main() -> None:
    """Print the table."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("data/sample")
    files = sorted(folder.glob("*.jpg"))
    began = time.process_time()
    names = (*METRICS, *PAIR_METRICS)
    print("| change | " + " | ".join(f"{card(n).name} {card(n).arrow}" for n in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for change, make in CHANGES.items():
        found = []
        for file in files:
            pixels = read_rgb(file).pixels
            top, left = ((max(0, edge - CROP_PX) // 2) for edge in pixels.shape[:2])
            original = np.ascontiguousarray(pixels[top : top + CROP_PX, left : left + CROP_PX])
            found.append(measured(original, np.asarray(make(Image.fromarray(original)))))
        cells = []
        for name in names:
            several = [one[name] for one in found if name in one]
            mean = float(np.mean(several)) if several else float("nan")
            cells.append("∞" if np.isinf(mean) else f"{mean:.{card(name).decimals}f}")
        print(f"| {change} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{len(files)} photographs, {time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
