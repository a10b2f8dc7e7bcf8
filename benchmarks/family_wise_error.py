"""How often a page finds a difference that is not there: systems with equal means in every metric.

    python benchmarks/family_wise_error.py [PAGES] [SHAPE ...]

A page compares two systems with a baseline in four metrics over 24 prompts of two pictures, as
`ultraflux report` does: eight tests, Holm's correction over all, and a verdict only where test and
interval agree. Prints the share of pages with any verdict, and with any p-value below 5%
uncorrected.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from components.evaluation.statistics.comparison import Comparison
from components.evaluation.suites.against_baseline import LEVEL, against_baseline, verdict

METRICS = ("psnr_db", "ssim", "glcm_score", "piqe")
SYSTEMS = ("base", "one", "two")
PROMPTS, PER_PROMPT = 24, 2
SHAPES: dict[str, Callable[..., Any]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "exponential": lambda rng, size: rng.exponential(size=size),
    "log-normal": lambda rng, size: rng.lognormal(size=size),
}
OFFSETS: dict[str, Callable[..., Any]] = {
    "exponential differences": lambda rng, size: rng.exponential(size=size) - 1.0,
    "log-normal differences, 0.5": lambda rng, size: rng.lognormal(0.0, 0.5, size) - np.exp(0.125),
    "log-normal differences, 1": lambda rng, size: rng.lognormal(size=size) - np.exp(0.5),
}
_FOUND = {"better", "worse", "differs"}


def page(rng: np.random.Generator, shape: str) -> pd.DataFrame:
    """Scores of three systems with equal means; pictures of one prompt are alike."""
    rows = []
    size = (PROMPTS, 1)
    for metric in METRICS:
        base = rng.normal(size=size)
        for system in SYSTEMS:
            if shape in SHAPES:
                of_prompt = SHAPES[shape](rng, size)
            else:
                of_prompt = base + (OFFSETS[shape](rng, size) if system != "base" else 0.0)
            values = of_prompt + 0.3 * rng.normal(size=(PROMPTS, PER_PROMPT))
            rows += [
                {"system": system, "metric": metric, "value": float(values[prompt, number])}
                | {"item": f"{prompt}-{number}", "prompt": f"prompt {prompt}"}
                | {"image": f"{prompt}-{number}", "protocol": "x", "height": 8, "width": 8}
                for prompt in range(PROMPTS)
                for number in range(PER_PROMPT)
            ]
    return pd.DataFrame(rows)


def errors(pages: int, shape: str) -> tuple[float, float]:
    """Share of pages with a verdict, and with an uncorrected p-value below the level."""
    rng = np.random.default_rng(1)
    wrong = uncorrected = 0
    for number in range(pages):
        table = page(rng, shape)
        found: list[Comparison] = [
            one
            for part in against_baseline(table, SYSTEMS, "base", resamples=999, seed=number)
            for one in part.comparisons
        ]
        verdicts = {
            verdict(
                c.metric, c.difference.mean, c.adjusted_p, (c.difference.low, c.difference.high)
            )
            for c in found
        }
        wrong += bool(verdicts & _FOUND)
        uncorrected += any(c.p_value < LEVEL for c in found)
    return wrong / pages, uncorrected / pages


def main() -> None:
    """Print a row per shape."""
    pages = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    began = time.process_time()
    print("| differences | pages with a verdict | with an uncorrected p below 5% |\n|---|---|---|")
    for shape in sys.argv[2:] or (*SHAPES, *OFFSETS):
        wrong, uncorrected = errors(pages, shape)
        print(f"| {shape} | {wrong:.1%} | {uncorrected:.1%} |", flush=True)
    print(f"\n{pages} pages of 8 tests, {time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
