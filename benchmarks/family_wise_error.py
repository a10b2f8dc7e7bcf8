"""How often a page finds a difference that is not there: systems with equal means in every metric.

    python benchmarks/family_wise_error.py [--pages 4000] [--prompts 24] [SHAPE ...]

A page compares two systems with a baseline in four metrics over prompts of two pictures, as
`ultraflux report` does: eight tests by `compared_means`, Holm's correction over all, and a
verdict only where test and interval agree. Prints the share of pages with any verdict, with any
that sign flips alone would find, and with any p-value below 5% uncorrected.
"""

from __future__ import annotations

import argparse
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
PER_PROMPT = 2
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


def page(rng: np.random.Generator, shape: str, prompts: int) -> list[PairedScores]:
    """Baseline against each other system, equal means; pictures of one prompt are alike."""
    size = (prompts, 1)
    clusters = tuple(f"prompt {number}" for number in range(prompts) for _ in range(PER_PROMPT))
    pairs = []
    for metric in METRICS:
        base = rng.normal(size=size)
        scores = []
        for system in SYSTEMS:
            if shape in SHAPES:
                of_prompt = SHAPES[shape](rng, size)
            else:
                of_prompt = base + (OFFSETS[shape](rng, size) if system != "base" else 0.0)
            scores.append((of_prompt + 0.3 * rng.normal(size=(prompts, PER_PROMPT))).ravel())
        pairs += [PairedScores(metric, "x", scores[0], other, clusters, 0) for other in scores[1:]]
    return pairs


def errors(pages: int, shape: str, prompts: int) -> list[float]:
    """Share of pages with a verdict; by sign flips alone; with an uncorrected p-value below 5%."""
    rng = np.random.default_rng(1)
    counts = np.zeros(3)
    for number in range(pages):
        # Draws depend on prompts and seed alone, and are kept while both stay.
        seed = number // 100
        tests = page(rng, shape, prompts)
        found = [compared_means(pairs, resamples=999, seed=seed) for pairs in tests]
        signs = [
            paired_permutation(
                pairs.before, pairs.after, permutations=3996, seed=seed, clusters=pairs.clusters
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = (*SHAPES, *OFFSETS)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of: {'; '.join(known)}")
    parser.add_argument("--pages", type=int, default=4000)
    parser.add_argument("--prompts", type=int, default=24)
    asked = parser.parse_args()
    if unknown := set(asked.shapes) - set(known):
        parser.error(f"no shape {min(unknown)!r}: one of {'; '.join(known)}")
    began = time.process_time()
    print("| scores | pages with a verdict | sign flips alone | with an uncorrected p below 5% |")
    print("|---|---|---|---|")
    for shape in asked.shapes or known:
        found = errors(asked.pages, shape, asked.prompts)
        print(f"| {shape} | {' | '.join(f'{x:.1%}' for x in found)} |", flush=True)
    seconds = time.process_time() - began
    print(f"\n{asked.pages} pages of 8 tests, {asked.prompts} prompts, {seconds:.0f} CPU seconds")


if __name__ == "__main__":
    main()
