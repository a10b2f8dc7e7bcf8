"""How often 95% intervals hold the true mean: simulated samples with four pictures a prompt.

    python benchmarks/interval_coverage.py [SAMPLES] [--shape SHAPE ...] [--column COLUMN ...]

Prints a row per shape and number of prompts: the interval of every page, Student's t over prompts,
the studentised bootstrap alone, and what an interval over pictures would cover.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from components.evaluation.statistics.bootstrap import IntervalMethod, mean_interval

PER_PROMPT = 4
CLUSTERS = (4, 8, 12, 20, 50)
SHAPES = {
    "normal": (lambda rng, k: rng.normal(0.0, 1.0, k), 0.0),
    "exponential": (lambda rng, k: rng.exponential(1.0, k), 1.0),
    "log-normal, 0.5": (lambda rng, k: rng.lognormal(0.0, 0.5, k), float(np.exp(0.125))),
    "log-normal, 1": (lambda rng, k: rng.lognormal(0.0, 1.0, k), float(np.exp(0.5))),
}
COLUMNS: dict[str, tuple[IntervalMethod, bool]] = {
    "printed": ("guarded", True),
    "studentised alone": ("studentised", True),
    "percentile": ("percentile", True),
    "over pictures": ("percentile", False),
}


def coverage(shape: str, clusters: int, samples: int, columns: Sequence[str]) -> dict[str, float]:
    """Share of samples whose interval holds the mean, by column."""
    draw, truth = SHAPES[shape]
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(clusters), PER_PROMPT).tolist()
    hits = dict.fromkeys(columns, 0)
    for sample in range(samples):
        values = np.repeat(draw(rng, clusters), PER_PROMPT) + rng.normal(0, 0.25, len(labels))
        for column in columns:
            method, by_prompt = COLUMNS[column]
            if method == "studentised" and clusters < 6:
                continue
            found = mean_interval(
                values,
                clusters=labels if by_prompt else None,
                resamples=999,
                seed=sample,
                method=method,
            )
            hits[column] += found.low <= truth <= found.high
    return {column: count / samples for column, count in hits.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=int, nargs="?", default=10_000)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--column", choices=COLUMNS, action="append")
    asked = parser.parse_args()
    samples, columns = asked.samples, asked.column or list(COLUMNS)
    began = time.process_time()
    print("| prompts' means | prompts | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for shape in asked.shape or SHAPES:
        for clusters in CLUSTERS:
            found = coverage(shape, clusters, samples, columns)
            cells = (f"{value:.1%}" if value else "–" for value in found.values())
            print(f"| {shape} | {clusters} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{samples} samples, {time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
