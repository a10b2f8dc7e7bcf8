"""What looking for faces costs beside the signals pass, per photograph.

    python benchmarks/corpus_faces.py [FOLDER] [--edge 256] [--rounds 3]

Every JPEG of the folder is shrunk to `--edge` pixels first, as a small photograph; 0 leaves it as
it is. Times are CPU milliseconds of the process, the fastest round of each, then the mean:

- signals: one row of the signals stage, GLCM included, as the default settings have it.
- faces: decode of the derivative and both passes over it (`people.detector: classical`).
- every position: the same by one scan of every position at full size, as it was before.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from components.corpus.people.faces import find_faces, scan_everywhere
from components.images.decoding import decode_rgb
from components.signals.candidate import Candidate, measure_candidate, prepare_worker
from components.signals.flat_regions import grayscale

ROOT = Path(__file__).resolve().parents[1]


def fastest_ms(function: Callable[[], Any], rounds: int) -> float:
    """CPU milliseconds of the fastest round."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "data" / "sample")
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prepare_worker()
    rows: dict[str, list[float]] = {"signals": [], "faces": [], "every position": []}
    found = {"faces": 0, "every position": 0}
    with tempfile.TemporaryDirectory() as scratch:
        for source in sorted(options.folder.glob("*.jpg")):
            path = Path(scratch) / source.name
            with Image.open(source) as image:
                if options.edge:
                    image.thumbnail((options.edge, options.edge))
                image.convert("RGB").save(path, quality=92)
            candidate = Candidate(path, 240, 800.0, 1024, 400.0)
            jpeg = measure_candidate(candidate)["jpeg"]
            finders = {
                "faces": lambda jpeg=jpeg: find_faces(decode_rgb(jpeg).pixels),
                "every position": lambda jpeg=jpeg: scan_everywhere(
                    grayscale(decode_rgb(jpeg).pixels)
                ),
            }
            signals = fastest_ms(lambda one=candidate: measure_candidate(one), options.rounds)
            rows["signals"].append(signals)
            for name, find in finders.items():
                found[name] += len(find())
                rows[name].append(fastest_ms(find, options.rounds))
    print(f"{len(rows['signals'])} photographs, {options.edge or 'their own'} px, CPU ms each:")
    for name, times in rows.items():
        print(
            f"{name:15} mean {statistics.fmean(times):6.1f}, {min(times):.1f} to {max(times):.1f}"
        )
    print(f"faces found: {found}")


if __name__ == "__main__":
    main()
