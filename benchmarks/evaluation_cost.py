"""What evaluating 16 pairs of 4096 x 4096 with two cheap metrics costs beside decoding them.

    python benchmarks/evaluation_cost.py FOLDER

Writes 16 references and 16 pictures (bundled photographs, resized; JPEG at quality 95 and 80) below
FOLDER, decodes all 32 once, then runs `ultraflux evaluate` with one worker and an empty ledger on
PSNR and NMSE. Prints CPU seconds of both, of this process and its children, and the time
that the worker's start takes, which is part of the second.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.images.decoding import read_rgb

ROOT = Path(__file__).resolve().parents[1]
SIZE_PX, PAIRS = 4096, 16


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
    subprocess.run([sys.executable, "-m", "flows.cli", *words], check=True, cwd=ROOT)
    return cpu(resource.RUSAGE_CHILDREN) - before


def main() -> None:
    """Print the seconds and their ratio."""
    folder = Path(sys.argv[1]).absolute()
    make(folder)
    before = cpu(resource.RUSAGE_SELF)
    for kind in ("real", "mine"):
        for place in range(PAIRS):
            read_rgb(folder / kind / f"{place}.jpg")
    decoding = cpu(resource.RUSAGE_SELF) - before
    one, all_pairs = evaluate(folder, 1), evaluate(folder, PAIRS)
    per_pair = (all_pairs - one) / (PAIRS - 1)
    print(
        f"decoding {2 * PAIRS} pictures {decoding:.1f} CPU s; evaluating {PAIRS} pairs "
        f"{all_pairs:.1f} ({all_pairs / decoding:.2f} times), of which 1 pair with the start of "
        f"command and worker {one:.1f}; each further pair {per_pair:.2f}, "
        f"{per_pair * PAIRS / decoding:.2f} times its decoding; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
