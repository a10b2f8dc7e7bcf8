"""Size of an evaluation's page at 195 pairs of 4096 x 4096, and how fast a browser opens it.

    python benchmarks/report_size.py make runs/report-size          # pictures and scores, once
    ultraflux report runs/report-size/evaluation                    # the page
    python benchmarks/report_size.py open runs/report-size/evaluation/report.html

`make` shifts a few bundled photographs, resized to 4096 x 4096, to 195 distinct pictures; the
second system is the same with half the JPEG quality. The scores are drawn at random: this measures
a page, not pictures. `open` needs Debian's package `chromium`; exit code 1: the median
page takes 3 s and more until it is interactive.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from components.evaluation.suites.suite_scores import headline
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.metrics.cards import card

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample"
SIZE_PX = 4096
SYSTEMS = {"quality90": 90, "quality45": 45}
METRICS = {"psnr_db": (34, 3), "ssim": (0.9, 0.03), "glcm_score": (0.6, 0.1), "musiq": (45, 6)}
RUNS = 3
MOST_MS = 3000


def make(target: Path, count: int, photographs: int) -> None:
    """Write pictures below `target`/images and an evaluation into `target`/evaluation."""
    bases = []
    for path in sorted(SAMPLE.glob("*.jpg"))[:photographs]:
        with Image.open(path) as image:
            bases.append(np.asarray(fit_to_bucket(image.convert("RGB"), Bucket(SIZE_PX, SIZE_PX))))
    rng = np.random.default_rng(0)
    shifts = rng.integers(0, SIZE_PX, size=(count, 2))

    def write(index: int) -> list[dict[str, str]]:
        shifted = np.roll(bases[index % len(bases)], shifts[index], axis=(0, 1))
        picture, found = Image.fromarray(shifted), []
        for system, quality in SYSTEMS.items():
            path = target / "images" / system / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality)
            path.write_bytes(buffer.getvalue())
            digest = hashlib.sha256(buffer.getvalue()).hexdigest()
            found.append(
                {"system": system, "item": f"{index:04d}", "path": str(path.resolve())}
                | {"sha256": digest, "prompt": f"Photograph {index}, shifted", "reference": ""}
            )
        return found

    with ThreadPoolExecutor(2) as pool:
        pictures = [entry for entries in pool.map(write, range(count)) for entry in entries]
    pictures.sort(key=lambda entry: (list(SYSTEMS).index(entry["system"]), entry["item"]))
    rows = [
        {"image": Path(p["path"]).name, "system": p["system"], "height": SIZE_PX, "width": SIZE_PX}
        | {"metric": metric, "protocol": card(metric).protocol, "item": p["item"]}
        | {"value": float(rng.normal(mean - spread * (p["system"] == "quality45"), spread))}
        | {"stratum": f"{SIZE_PX}x{SIZE_PX}", "image_sha256": p["sha256"], "error": None}
        for p in pictures
        for metric, (mean, spread) in METRICS.items()
    ]
    table = pd.DataFrame(rows)
    out = target / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    table.to_parquet(out / "scores.parquet", index=False)
    description = {
        "suite": "report-size",
        "protocol": "synthetic",
        "items": count,
        "metrics": headline(table, resamples=200, seed=0),
        "unavailable": {},
        "failed_systems": {},
    }
    (out / "metrics.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    lines = "\n".join(json.dumps(picture) for picture in pictures)
    (out / "pictures.jsonl").write_text(lines + "\n")


_TIMES = """(() => {
  const entry = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return { first_paint_ms: paint?.startTime, interactive_ms: entry.domInteractive,
           loaded_ms: entry.loadEventEnd, elements: document.querySelectorAll("*").length };
})()"""


async def open_page(page: Path) -> int:
    """Print medians over fresh browsers, and the time from a click to both panes with pixels."""
    from browser import open_browser

    found: list[dict[str, float]] = []
    for _ in range(RUNS):
        async with open_browser() as tab:
            await tab.navigate(page)
            times = await tab.evaluate(_TIMES)
            started = time.monotonic()
            await tab.evaluate("document.querySelector('#images button.open').click()")
            await tab.wait_for(
                "[...document.querySelectorAll('#viewer .native')].filter("
                "(image) => image.complete && image.naturalWidth).length >= 2"
            )
            times["click_to_pixels_ms"] = 1000 * (time.monotonic() - started)
            found.append(times)
    # A browser that is short of time has painted and not yet said so.
    names = [name for name in found[0] if all(run.get(name) is not None for run in found)]
    medians = {name: statistics.median(run[name] for run in found) for name in names}
    size = f"{page.stat().st_size / 1e6:.1f} MB, medians of {RUNS} fresh browsers"
    print(f"{size}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores:")
    for name, value in medians.items():
        print(f"  {name:<20} {value:8.0f}")
    return 1 if medians["interactive_ms"] >= MOST_MS else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    maker = actions.add_parser("make")
    maker.add_argument("target", type=Path)
    maker.add_argument("--count", type=int, default=195)
    maker.add_argument("--photographs", type=int, default=12)
    opener = actions.add_parser("open")
    opener.add_argument("page", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.target, arguments.count, arguments.photographs)
    else:
        sys.exit(asyncio.run(open_page(arguments.page)))
