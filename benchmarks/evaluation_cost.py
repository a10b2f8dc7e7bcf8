"""What evaluating 16 pairs of 4096 x 4096 with two cheap metrics costs beside decoding them.

    python benchmarks/evaluation_cost.py FOLDER [--rounds 3]

Writes 16 references and 16 pictures (bundled photographs, resized; JPEG at quality 95 and 80) below
FOLDER. A round decodes all 32, runs `ultraflux evaluate` with one worker and an empty ledger on
PSNR and NMSE of one pair, and of all 16. Prints medians of CPU seconds, children included. Exit
code 1: what the pairs cost, without the start of command and worker, is above 1.2 times decoding
them in every round. The start does not grow with the pictures, so it is printed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image

from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.images.decoding import read_rgb

ROOT = Path(__file__).resolve().parents[1]
SIZE_PX, PAIRS = 4096, 16
MOST = 1.2
"""Times the decoding."""


def make(folder: Path) -> None:
    """Pictures and the suite's metadata; what is there stays."""
    lines = []
    for place, photograph in enumerate(sorted((ROOT / "data" / "sample").glob("*.jpg"))[:PAIRS]):
        lines.append(json.dumps({"file_name": f"{place}.jpg", "text": f"photograph {place}"}))
        paths = [folder / kind / f"{place}.jpg" for kind in ("real", "mine")]
        if all(path.is_file() for path in paths):
            continue
        with Image.open(photograph) as image:
            fitted = fit_to_bucket(image.convert("RGB"), Bucket(SIZE_PX, SIZE_PX))
        for path, quality in zip(paths, (95, 80), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            fitted.save(path, quality=quality)
    (folder / "real" / "metadata.jsonl").write_text("\n".join(lines))


def cpu(who: int) -> float:
    """CPU seconds so far."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def evaluate(folder: Path, limit: int) -> float:
    """CPU seconds of the command and its worker."""
    shutil.rmtree(folder / "ledger", ignore_errors=True)
    before = cpu(resource.RUSAGE_CHILDREN)
    words = ["evaluate", str(folder / "real"), "--system", f"mine={folder / 'mine'}"]
    words += ["--metrics", "psnr_db,nmse", "--limit", str(limit), "--relock"]
    words += ["--out", str(folder / "out"), "--ledger", str(folder / "ledger")]
    command = [sys.executable, "-m", "flows.cli", *words]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return cpu(resource.RUSAGE_CHILDREN) - before


def decode(folder: Path) -> float:
    """CPU seconds of decoding every picture."""
    before = cpu(resource.RUSAGE_SELF)
    for kind in ("real", "mine"):
        for place in range(PAIRS):
            read_rgb(folder / kind / f"{place}.jpg")
    return cpu(resource.RUSAGE_SELF) - before


def main() -> int:
    """Print seconds and ratios; 1 where the limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    make(folder)
    # The first run of a checkout reads what the code means for the lock, later ones find it.
    evaluate(folder, 1)
    rounds = [
        (decode(folder), evaluate(folder, 1), evaluate(folder, PAIRS)) for _ in range(asked.rounds)
    ]
    ratios = []
    for decoding, one, all_pairs in rounds:
        pairs = (all_pairs - one) * PAIRS / (PAIRS - 1)
        ratios.append(pairs / decoding)
        print(
            f"decoding {2 * PAIRS} pictures {decoding:.2f} CPU s; evaluating {PAIRS} pairs "
            f"{pairs:.2f} ({pairs / decoding:.2f} times) after a start of {all_pairs - pairs:.2f}; "
            f"together {all_pairs / decoding:.2f} times; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    print(f"median {statistics.median(ratios):.2f} times decoding, at most {MOST}")
    return 1 if min(ratios) > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
