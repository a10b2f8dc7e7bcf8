"""Near-duplicates among a million PDQ hashes: wall time and peak memory on one core.

Random hashes with planted copies, so that the right answer is known from the planting alone.
`python benchmarks/corpus_dedup.py [--rows N] [--kind tenth|pairs|crowd]`: `tenth` of the rows are
copies of others with 0 to 31 bits flipped; `pairs`: half of them are; `crowd`: a tenth are copies
of one picture. One JSON line comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

import numpy as np
import pandas as pd

from components.corpus.selection.duplicates import (
    hamming_distance,
    hashes_to_words,
    keepers,
    near_duplicate_stars,
)

LIMIT_S = 300.0
LIMIT_GIB = 4.0
DISTANCE = 31


def synthetic(rows: int, kind: str, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """A table with `rows` images, and the original of each (its own place for an original)."""
    rng = np.random.default_rng(seed)
    copies = rows // 2 if kind == "pairs" else rows // 10
    hashes = rng.integers(0, 256, (rows, 32), dtype=np.uint8)
    # Copies of originals only, at most 31 bits away.
    places = rng.random((copies, 256), dtype=np.float32).argsort(axis=1)
    flips = places < rng.integers(0, DISTANCE + 1, copies)[:, None]
    of = rng.integers(0, rows - copies, copies) if kind != "crowd" else np.zeros(copies, np.int64)
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
    return table, np.r_[np.arange(rows - copies), of]


def expected_keepers(table: pd.DataFrame, original: np.ndarray) -> np.ndarray:
    """The answer from the planted groups: in each, best first, all within the limit are dropped."""
    words = hashes_to_words(table["pdq_hash"])
    order = table.assign(pixels=table["width"] * table["height"]).sort_values(
        ["pixels", "quality_score", "image_id"], ascending=[False, False, True]
    )
    keeper = np.arange(len(table))
    sizes = np.bincount(original, minlength=len(table))
    members = order.index[sizes[original[order.index]] > 1].to_numpy()
    for _, group in pd.Series(members).groupby(original[members]):
        left = group.to_numpy()
        while len(left):
            near = hamming_distance(words[left], words[left[:1]]) <= DISTANCE
            keeper[left[near]] = left[0]
            left = left[~near]
    return keeper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("tenth", "pairs", "crowd"), default="tenth")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table, original = synthetic(arguments.rows, arguments.kind)
    # Compiled code comes from the cache in every run but the first.
    near_duplicate_stars(np.zeros((2, 4), np.uint64), DISTANCE)
    wall, cpu = time.perf_counter(), time.process_time()
    found, distance = keepers(table, max_distance=DISTANCE)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # Peak of the whole process, imports and table included.
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    is_right = bool((found == expected_keepers(table, original)).all())
    result = {
        "kind": arguments.kind,
        "rows": arguments.rows,
        "planted": int((original != np.arange(len(table))).sum()),
        "dropped": int((found != np.arange(len(table))).sum()),
        "farthest": int(np.nanmax(distance)),
        "right": is_right,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "peak_gib": round(peak_gib, 2),
        "limits": {"wall_s": LIMIT_S, "gib": LIMIT_GIB},
        "passes": is_right and cpu < LIMIT_S and peak_gib < LIMIT_GIB,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
