"""How often 95% intervals hold the true mean: simulated samples of one to four pictures a prompt.

    python benchmarks/interval_coverage.py [SAMPLES] [--shape SHAPE ...] [--column COLUMN ...]

Prints a row per shape and number of prompts: the interval of every page (four pictures a prompt,
and one), the studentised bootstrap alone, the percentile bootstrap, and what an interval over
pictures would cover. Exit code 1: from 8 prompts on a printed interval covers less than 93% or more
than 97%, by more than twice the simulation's standard error.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import numpy as np

from components.evaluation.statistics.bootstrap import (
    FEWEST_STUDENTISED_CLUSTERS,
    IntervalMethod,
    mean_interval,
)

GOAL = (0.93, 0.97)
FEWEST = 8
"""Prompts from which the goal counts."""
CLUSTERS = (4, 6, 8, 12, 20, 50)
SHAPES = {
    "normal": (lambda rng, k: rng.normal(0.0, 1.0, k), 0.0),
    "exponential": (lambda rng, k: rng.exponential(1.0, k), 1.0),
    "log-normal, 0.5": (lambda rng, k: rng.lognormal(0.0, 0.5, k), float(np.exp(0.125))),
    "log-normal, 1": (lambda rng, k: rng.lognormal(0.0, 1.0, k), float(np.exp(0.5))),
    "Student's t, 5": (lambda rng, k: rng.standard_t(5, k), 0.0),
    "grades 1 to 5": (lambda rng, k: rng.choice(5, k, p=[0.05, 0.1, 0.2, 0.35, 0.3]), 2.75),
}
COLUMNS: dict[str, tuple[IntervalMethod, bool, int]] = {
    "printed": ("extended", True, 4),
    "printed, one picture": ("extended", True, 1),
    "studentised alone": ("studentised", True, 4),
    "percentile": ("percentile", True, 4),
    "over pictures": ("percentile", False, 4),
}
"""Method, whether prompts are units, and pictures a prompt."""


def coverage(shape: str, clusters: int, samples: int, column: str) -> float | None:
    """Share of samples whose interval holds the mean; None where the method needs more prompts."""
    draw, truth = SHAPES[shape]
    method, by_prompt, each = COLUMNS[column]
    if method == "studentised" and clusters < FEWEST_STUDENTISED_CLUSTERS:
        return None
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(clusters), each).tolist()
    hits = 0
    for sample in range(samples):
        values = np.repeat(draw(rng, clusters), each) + rng.normal(0, 0.25, len(labels))
        units = labels if by_prompt else None
        found = mean_interval(values, clusters=units, resamples=999, seed=sample, method=method)
        hits += found.low <= truth <= found.high
    return hits / samples


def keeps(covered: float, samples: int) -> bool:
    """Whether a coverage lies within `GOAL`, up to two standard errors of the simulation."""
    error = 2.0 * math.sqrt(0.95 * 0.05 / samples)
    return GOAL[0] - error <= covered <= GOAL[1] + error


def main() -> int:
    """Print the table; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=int, nargs="?", default=10_000)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--column", choices=COLUMNS, action="append")
    asked = parser.parse_args()
    samples, columns = asked.samples, asked.column or list(COLUMNS)
    began = time.process_time()
    missed: list[str] = []
    print("| prompts' means | prompts | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for shape in asked.shape or SHAPES:
        for clusters in CLUSTERS:
            found = {column: coverage(shape, clusters, samples, column) for column in columns}
            cells = ("–" if value is None else f"{value:.1%}" for value in found.values())
            print(f"| {shape} | {clusters} | " + " | ".join(cells) + " |", flush=True)
            if clusters >= FEWEST:
                missed += [
                    f"{shape}, {clusters} prompts, {column}: {value:.1%}"
                    for column, value in found.items()
                    if COLUMNS[column][0] == "extended" and value and not keeps(value, samples)
                ]
    print(f"\n{samples} samples, {time.process_time() - began:.0f} CPU seconds")
    print("\n".join(["missed:", *missed]) if missed else "every printed interval keeps the goal")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
