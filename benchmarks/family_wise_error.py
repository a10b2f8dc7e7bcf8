"""How often a page finds a difference that is not there: systems with equal means in every metric.

    python benchmarks/family_wise_error.py [PAGES] [SHAPE ...]

A page compares two systems with a baseline in four metrics over 24 prompts of two pictures, as
`ultraflux report` does: eight tests by `compared_means`, Holm's correction over all, and a
verdict only where test and interval agree. Prints the share of pages with any verdict, with any
that sign flips alone would find, and with any p-value below 5% uncorrected.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from components.evaluation.statistics.comparison import PairedScores, compared_means
from components.evaluation.statistics.permutation import paired_permutation
from components.evaluation.suites.against_baseline import LEVEL, verdict
from components.statistics.multiple_tests import holm

METRICS = ("psnr_db", "ssim", "glcm_score", "piqe")
SYSTEMS = ("base", "one", "two")
PROMPTS, PER_PROMPT = 24, 2
CLUSTERS = tuple(f"prompt {number}" for number in range(PROMPTS) for _ in range(PER_PROMPT))
SHAPES: dict[str, Callable[..., Any]] = {
    "equal systems, normal": lambda rng, size: rng.normal(size=size),
    "equal systems, exponential": lambda rng, size: rng.exponential(size=size),
    "equal systems, log-normal": lambda rng, size: rng.lognormal(size=size),
}
OFFSETS: dict[str, Callable[..., Any]] = {
    "exponential differences": lambda rng, size: rng.exponential(size=size) - 1.0,
    "log-normal differences, 0.5": lambda rng, size: rng.lognormal(0.0, 0.5, size) - np.exp(0.125),
    "log-normal differences, 1": lambda rng, size: rng.lognormal(size=size) - np.exp(0.5),
}
_FOUND = {"better", "worse", "differs"}


def page(rng: np.random.Generator, shape: str) -> list[PairedScores]:
    """Baseline against each other system, equal means; pictures of one prompt are alike."""
    size = (PROMPTS, 1)
    pairs = []
    for metric in METRICS:
        base = rng.normal(size=size)
        scores = []
        for system in SYSTEMS:
            if shape in SHAPES:
                of_prompt = SHAPES[shape](rng, size)
            else:
                of_prompt = base + (OFFSETS[shape](rng, size) if system != "base" else 0.0)
            scores.append((of_prompt + 0.3 * rng.normal(size=(PROMPTS, PER_PROMPT))).ravel())
        pairs += [PairedScores(metric, "x", scores[0], other, CLUSTERS, 0) for other in scores[1:]]
    return pairs


def errors(pages: int, shape: str) -> list[float]:
    """Share of pages with a verdict; by sign flips alone; with an uncorrected p-value below 5%."""
    rng = np.random.default_rng(1)
    counts = np.zeros(3)
    for number in range(pages):
        # Draws depend on prompts and seed alone, and are kept while both stay.
        seed = number // 100
        tests = page(rng, shape)
        found = [compared_means(pairs, resamples=999, seed=seed) for pairs in tests]
        signs = [
            paired_permutation(
                pairs.before, pairs.after, permutations=3996, seed=seed, clusters=CLUSTERS
            ).p_value
            for pairs in tests
        ]
        verdicts = {
            verdict(pairs.metric, difference.mean, adjusted, (difference.low, difference.high))
            for pairs, (difference, _), adjusted in zip(
                tests, found, corrected([p for _, p in found]), strict=True
            )
        }
        counts += [
            bool(verdicts & _FOUND),
            min(corrected(signs)) < LEVEL,
            min(p for _, p in found) < LEVEL,
        ]
    return list(counts / pages)


def corrected(p_values: list[float]) -> list[float]:
    """Holm's, in the same order."""
    return list(holm({str(number): p for number, p in enumerate(p_values)}).values())


def main() -> None:
    """Print a row per shape."""
    pages = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    began = time.process_time()
    print("| scores | pages with a verdict | sign flips alone | with an uncorrected p below 5% |")
    print("|---|---|---|---|")
    for shape in sys.argv[2:] or (*SHAPES, *OFFSETS):
        print(f"| {shape} | {' | '.join(f'{x:.1%}' for x in errors(pages, shape))} |", flush=True)
    print(f"\n{pages} pages of 8 tests, {time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
