"""How long the batch plan takes to jump to a step, and what it holds in memory.

    python benchmarks/batch_plan.py [--samples 1000000] [--buckets 21] [--batch 64] [--jumps 50]

Ids are hexadecimal SHA-256 as in the corpus; bucket sizes fall like 1/rank. A jump asks for a
random step of the first 100 epochs, so nothing of it is remembered; the next step of the same epoch
stands beside it. `built` is the plan's construction, once per process: sorting and hashing the ids.
Memory is what the plan adds to the process beside the caller's mapping, from its resident set.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import platform
import resource
import statistics
import time
from pathlib import Path

import numpy as np

from components.training.dit.batch_plan import BatchPlan


def resident_mb() -> float:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--buckets", type=int, default=21)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--jumps", type=int, default=50)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, options.buckets + 1)
    buckets = rng.choice(options.buckets, options.samples, p=shares / shares.sum()).tolist()
    corpus = {
        hashlib.sha256(str(number).encode()).hexdigest(): f"bucket{bucket:02d}"
        for number, bucket in enumerate(buckets)
    }
    gc.collect()
    before = resident_mb()
    begin = time.perf_counter()
    plan = BatchPlan(corpus, options.batch, seed=1)
    built = time.perf_counter() - begin
    gc.collect()
    held = resident_mb() - before
    jumps, following = [], []
    for step in rng.integers(0, 100 * plan.steps_per_epoch, options.jumps).tolist():
        for times, wanted in ((jumps, step), (following, step + 1)):
            begin = time.perf_counter()
            plan.batch(wanted)
            times.append(time.perf_counter() - begin)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"{options.samples} samples, {options.buckets} buckets, batch {options.batch}, "
        f"{plan.steps_per_epoch} steps per epoch"
    )
    print(f"built            {built:.2f} s, {held:.0f} MB")
    for name, times in (("jump", jumps), ("the step after", following)):
        print(
            f"{name:16} median {statistics.median(times) * 1e3:.1f} ms, "
            f"{max(times) * 1e3:.1f} ms at most, n = {len(times)}  (target below 200)"
        )
    caches = resident_mb() - before
    print(f"after the jumps  {caches:.0f} MB")


if __name__ == "__main__":
    main()
