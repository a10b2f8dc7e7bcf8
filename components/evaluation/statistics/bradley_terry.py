"""Bradley-Terry strengths with an order effect, and intervals clustered by prompt.

logit P(first shown wins) = strength[first] - strength[second] + order (Davidson and Beaver 1977, in
its additive form); a tie counts half a win for each. The order term takes up a judge's
preference for a position, so that strengths are those of the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PRIOR_SD = 10.0
"""Logits of a Gaussian prior on every parameter: keeps them finite where one system always wins,
and moves others by less than 1% of a standard error from some 20 comparisons on."""
# Ample: Newton doubles its digits near the optimum, and clipped steps still walk two logits each.
_STEPS = 100
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Judged:
    """One answered comparison."""

    first: str
    """System whose picture was shown first."""
    second: str
    score: float
    """Of the first: 1 it wins, 0.5 tie, 0 it loses."""
    prompt: str


@dataclass(frozen=True)
class Strength:
    """A parameter in logits with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths relative to the first system by name, and the advantage of being shown first."""

    strengths: dict[str, Strength]
    order: Strength
    comparisons: int
    prompts: int


def _curvature(
    design: npt.NDArray[np.float64], parameters: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Expected scores (n,), and the penalised information matrix."""
    # No guard against overflow: the prior keeps logits in the tens.
    expected = 1.0 / (1.0 + np.exp(-design @ parameters))
    # A win's variance under the model, also for ties, which vary less; the sandwich below does not
    # rely on it.
    weight = expected * (1.0 - expected)
    information = design.T @ (design * weight[:, None]) + np.eye(design.shape[1]) / _PRIOR_SD**2
    return expected, information


def fit_bradley_terry(judged: Sequence[Judged]) -> BradleyTerry:
    """Fit by Newton's method; errors are cluster-robust (sandwich) over prompts.

    Args:
        judged: comparisons of at least two systems over at least two prompts.

    Raises:
        ValueError: nothing to fit, a score outside [0, 1], or fewer than two prompts.
    """
    # Sorted, so that the same answers in another order have the same reference system and bytes.
    systems = sorted({one.first for one in judged} | {one.second for one in judged})
    prompts = sorted({one.prompt for one in judged})
    if len(systems) < 2 or len(prompts) < 2:
        raise ValueError(
            f"{len(systems)} systems over {len(prompts)} prompts: strengths need two of each"
        )
    score = np.array([one.score for one in judged])
    if not ((score >= 0.0) & (score <= 1.0)).all():
        raise ValueError("scores must lie in [0, 1]")
    # Strengths are known up to a constant only (chances depend on differences), so one is fixed at
    # 0 and its column is free.
    design = np.zeros((len(judged), len(systems)))
    for row, one in zip(design, judged, strict=True):
        # The column of the first system, whose strength is 0, holds the order effect.
        row[systems.index(one.first)] += 1.0
        row[systems.index(one.second)] -= 1.0
        # Set, not added: it overwrites what the first system's own strength wrote there.
        row[0] = 1.0
    parameters = np.zeros(len(systems))
    for _ in range(_STEPS):
        expected, information = _curvature(design, parameters)
        gradient = design.T @ (score - expected) - parameters / _PRIOR_SD**2
        step = np.linalg.solve(information, gradient)
        # At most two logits a step: far from the optimum a full Newton step overshoots into where
        # the curvature is nearly zero, and never comes back.
        parameters += step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        if np.abs(step).max() < _TOLERANCE:
            break
    # Once more, since the loop's values belong to the parameters before its last step.
    expected, information = _curvature(design, parameters)
    # Sandwich: residuals are summed by prompt before they are squared, because both orders of a
    # pair and all pairs of a prompt depend on the same pictures. P / (P - 1), and t with P - 1
    # degrees of freedom: the sample's size is its number of prompts P, not of comparisons.
    scores = np.zeros((len(prompts), len(systems)))
    rows = np.array([prompts.index(one.prompt) for one in judged])
    np.add.at(scores, rows, design * (score - expected)[:, None])
    # Invertible thanks to the prior, also where two systems never met.
    bread = np.linalg.inv(information)
    covariance = bread @ (scores.T @ scores) @ bread * len(prompts) / (len(prompts) - 1)
    from scipy.stats import t

    # Answers that agree to the last one have residuals that cancel, and the sandwich would call a
    # strength certain that nothing was learnt about (a judge that always says A): never less than
    # the model's own variance. A repeated answer is the same observation again.
    repeats = len(judged) / len({(one.first, one.second, one.prompt) for one in judged})
    variance = np.maximum(np.diag(covariance), np.diag(bread) * repeats)
    half = t.ppf(0.975, len(prompts) - 1) * np.sqrt(variance)
    fitted = [
        Strength(float(v), float(v - h), float(v + h))
        for v, h in zip(parameters, half, strict=True)
    ]
    # Zero by definition, so without an interval; `fitted[0]` is the order effect.
    strengths = {systems[0]: Strength(0.0, 0.0, 0.0)}
    strengths |= dict(zip(systems[1:], fitted[1:], strict=True))
    return BradleyTerry(strengths, fitted[0], len(judged), len(prompts))
