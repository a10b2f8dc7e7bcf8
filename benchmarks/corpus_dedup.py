"""Near-duplicates among a million PDQ hashes: wall time and peak memory on one core.

Random hashes with planted groups: a tenth of the rows are copies of others with 0 to 31 bits
flipped, so the right answer is known. Run `python benchmarks/corpus_dedup.py [--rows N]`; one JSON
line comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

import numpy as np
import pandas as pd

from components.corpus.selection.duplicates import mark_near_duplicates, near_duplicate_groups

LIMIT_S = 300.0
LIMIT_GIB = 4.0


def synthetic(rows: int, seed: int = 0) -> tuple[pd.DataFrame, int]:
    """A table with `rows` images and how many of them are planted copies."""
    rng = np.random.default_rng(seed)
    copies = rows // 10
    hashes = rng.integers(0, 256, (rows, 32), dtype=np.uint8)
    # Copies of originals only, at most 31 bits away.
    places = rng.random((copies, 256), dtype=np.float32).argsort(axis=1)
    flips = places < rng.integers(0, 32, copies)[:, None]
    of = rng.integers(0, rows - copies, copies)
    hashes[rows - copies :] = hashes[of] ^ np.packbits(flips, axis=1)
    digits = hashes.tobytes().hex()
    table = pd.DataFrame(
        {
            "image_id": [f"{n:064x}" for n in range(rows)],
            "width": rng.integers(3840, 8000, rows),
            "height": rng.integers(2160, 5000, rows),
            "quality_score": rng.random(rows),
            "pdq_hash": [digits[start : start + 64] for start in range(0, len(digits), 64)],
            "pdq_quality": np.full(rows, 100),
        }
    )
    return table, copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table, planted = synthetic(rows)
    # Compiled code comes from the cache in every run but the first.
    near_duplicate_groups(np.zeros((2, 4), np.uint64), 31)
    wall, cpu = time.perf_counter(), time.process_time()
    marked = mark_near_duplicates(table)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # Peak of the whole process, imports and table included.
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = int(marked["duplicate_of"].notna().sum())
    result = {
        "rows": rows,
        "planted": planted,
        "found": found,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "peak_gib": round(peak_gib, 2),
        "limits": {"wall_s": LIMIT_S, "gib": LIMIT_GIB},
        "passes": found == planted and cpu < LIMIT_S and peak_gib < LIMIT_GIB,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
