"""Permutation tests of the Fréchet distance at the papers' size, on one core.

    OMP_NUM_THREADS=1 python benchmarks/permutation_fid.py [--rows 195] [--resamples 1000]

Random features of Inception's width (2048). Prints seconds of the paired test (two systems against
one reference, as `ultraflux evaluate --baseline` runs it), and of one distance by the nuclear norm
and by the square root of the product of covariances (scipy sqrtm), and how far these are apart.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import scipy.linalg

from components.evaluation.statistics.set_comparison import paired_set_test
from components.metrics.networks.frechet import GramFrechet, frechet_distance

WIDTH = 2048


def _by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    gap = x.mean(axis=0) - y.mean(axis=0)
    return float(gap @ gap + np.trace(s1) + np.trace(s2) - 2 * np.trace(root))


def main() -> None:
    """Time each, once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=195)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--sqrtm", action="store_true", help="also the slow formula (minutes)")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    # Inception's features are non-negative and strongly correlated.
    mixing = generator.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    x, y, z = np.abs(generator.standard_normal((3, options.rows, WIDTH)) @ mixing)
    rows = np.arange(3 * options.rows)
    steps = {
        "paired": lambda: paired_set_test(
            GramFrechet(np.concatenate([x, y, z])),
            list(rows[: options.rows, None]),
            list(rows[options.rows : 2 * options.rows, None]),
            rows[2 * options.rows :],
            permutations=options.resamples,
            seed=1,
        ),
        "one distance": lambda: frechet_distance(x, y),
    }
    if options.sqrtm:
        steps["one distance, sqrtm"] = lambda: _by_sqrtm(x, y)
    for name, step in steps.items():
        wall, cpu = time.perf_counter(), time.process_time()
        result = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{name}: {wall:.2f} s wall, {cpu:.2f} s CPU: {result}")


if __name__ == "__main__":
    main()
