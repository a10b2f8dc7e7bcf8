"""Non-inferiority to a baseline: the paired lower bound of each metric against its margin.

A rule holds when the candidate may, with the stated confidence, be worse than the baseline by less
than the margin. Bound and p-value come from the same draws of the bootstrap over prompts as every
interval of a page (`bootstrap.extended_draws`), so they never disagree, and Holm's steps run over
the rules.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from components.evaluation.statistics.bootstrap import (
    ClusterSums,
    cluster_sums,
    extended_draws,
    one_sided_p_value,
)
from components.evaluation.statistics.comparison import ComparisonInvalid, paired_scores
from components.evaluation.statistics.power import (
    minimum_detectable_effect,
    non_inferiority_power,
)
from components.metrics.cards import card
from components.settings.evaluation import BaselineSettings, NonInferioritySettings, PromoteSettings


@dataclass(frozen=True)
class _Evidence:
    """Paired improvements of one rule, and their bootstrap."""

    rule: NonInferioritySettings
    grouped: ClusterSums
    draws: npt.NDArray[np.float64]
    detectable: float

    @property
    def p_value(self) -> float:
        """One-sided, of the hypothesis that the candidate is worse by the margin or more."""
        return one_sided_p_value(self.grouped, self.draws, -self.rule.margin)

    def lower_bound(self, level: float) -> float:
        """Of the mean improvement; below -margin exactly where `p_value` is above `level`."""
        error = self.grouped.standard_error
        if error == 0.0:
            return self.grouped.centre
        # The order statistic whose own p-value is at the level, so bound and p-value never
        # disagree; the factor keeps a product that is an integer from rounding to just below it.
        may_exceed = math.floor(level * (self.draws.size + 1) * (1.0 + 1e-12)) - 1
        # With so few draws no p-value is as small as the level: nothing can be shown.
        if may_exceed < 0:
            return -math.inf
        # The pivot is subtracted, so its upper tail gives the lower end. Where that draw is
        # infinite the bound is too, and the rule fails.
        return self.grouped.centre - float(self.draws[self.draws.size - may_exceed - 1]) * error

    def power(self, level: float) -> float:
        """Chance that an equal model would pass at this size and spread."""
        error, df = self.grouped.standard_error, self.grouped.clusters - 1
        return non_inferiority_power(self.rule.margin, error, df, level)


class BaselineUnusable(ValueError):
    """The file of the baseline is missing, or is another one than named; one line."""


def baseline_scores(root: Path, baseline: BaselineSettings | None) -> pd.DataFrame | None:
    """Scores of the champion; None where the settings name no baseline.

    The digest is compared because a baseline that was replaced in silence would move every verdict.

    Args:
        root: repository root.
        baseline: `promote.baseline`.

    Raises:
        BaselineUnusable: the file is missing, or is not the one whose digest the settings hold.
    """
    if baseline is None:
        return None
    path = root / baseline.scores
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BaselineUnusable(
            f"promote.baseline.scores = {baseline.scores}: no such file; fetch it (git, dvc pull), "
            "or set promote.baseline to null"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != baseline.sha256:
        raise BaselineUnusable(
            f"{baseline.scores} has sha256 {digest}, promote.baseline.sha256 says "
            f"{baseline.sha256}; restore the file, or set the new digest on purpose"
        )
    # From the bytes that were checked: a second reading could meet another file.
    return pd.read_parquet(io.BytesIO(data))


def rule_name(rule: NonInferioritySettings) -> str:
    """How a decision calls a rule."""
    return f"{rule.system}.{rule.metric}"


def _gather(
    rule: NonInferioritySettings,
    baseline: pd.DataFrame,
    candidate: pd.DataFrame,
    settings: PromoteSettings,
    seed: int,
) -> _Evidence:
    direction = card(rule.metric).direction
    if direction == "neither":
        raise ComparisonInvalid(f"{rule.metric}: neither direction is better, so none is worse")
    pairs = paired_scores(
        baseline[baseline["system"] == rule.system],
        candidate[candidate["system"] == rule.system],
        rule.metric,
    )
    # From here on larger is better: one bound and one positive margin serve both directions.
    improvement = pairs.differences if direction == "higher" else -pairs.differences
    try:
        grouped = cluster_sums(improvement, pairs.clusters)
        # One seed for all rules: over the same prompts they see the same draws, so that two rules
        # never differ by the luck of resampling.
        draws = extended_draws(grouped, resamples=settings.resamples, seed=seed)
    # Too few prompts, mostly. It fails like a loss: without evidence nothing is promoted.
    except ValueError as problem:
        raise ComparisonInvalid(f"{rule.metric}: {problem}") from None
    return _Evidence(
        rule,
        grouped,
        draws,
        # Reported, never decided by: it tells a model that is worse from a comparison too small to
        # show that it is not.
        minimum_detectable_effect(improvement, clusters=pairs.clusters),
    )


def _refused(rule: NonInferioritySettings, reason: str) -> dict[str, Any]:
    return {
        "name": rule_name(rule),
        "kind": "non_inferiority",
        "value": None,
        "threshold": -rule.margin,
        "passed": False,
        "margin": None,
        "reason": reason,
    }


def _judged(evidence: _Evidence, level: float) -> dict[str, Any]:
    bound = evidence.lower_bound(level)
    finite = math.isfinite(bound)
    # Equality passes, as it does in the p-value: the two must never give two answers.
    passed = finite and bound >= -evidence.rule.margin
    n = int(evidence.grouped.sizes.sum())
    if not finite:
        reason = f"{evidence.draws.size} resamples are too few for level {level:.3g}"
    elif passed:
        reason = ""
    else:
        reason = (
            f"improvement {evidence.grouped.centre:.4g} over the baseline with lower bound "
            f"{bound:.4g} at level {level:.3g} (n = {n} of {evidence.grouped.clusters} prompts); "
            f"at most {evidence.rule.margin:.4g} may be lost"
        )
    return {
        "name": rule_name(evidence.rule),
        "kind": "non_inferiority",
        # JSON has no infinity.
        "value": bound if finite else None,
        "threshold": -evidence.rule.margin,
        "passed": passed,
        "margin": bound + evidence.rule.margin if finite else None,
        "improvement": evidence.grouped.centre,
        "p_value": evidence.p_value,
        "level": level,
        "n": n,
        "prompts": evidence.grouped.clusters,
        "detectable": evidence.detectable,
        "power": evidence.power(level),
        "reason": reason,
    }


def judge_non_inferiority(
    baseline: pd.DataFrame,
    candidate: pd.DataFrame,
    settings: PromoteSettings,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Judge every rule of `settings.non_inferiority`.

    Args:
        baseline: scores with the columns of `components.evaluation.statistics.scores`.
        candidate: the same of the models that ask for promotion.
        settings: rules, significance, resamples and correction.
        seed: of the bootstrap.
        say: gets each rule's power before any is decided.

    Returns:
        JSON-ready rules in the order of the settings. `value` is the lower bound of the mean
        improvement (candidate - baseline, sign turned where lower is better) in the metric's unit,
        `threshold` the negative margin. What cannot be compared fails, with the reason.
    """
    judged: dict[int, dict[str, Any]] = {}
    gathered: dict[int, _Evidence] = {}
    for index, rule in enumerate(settings.non_inferiority):
        try:
            gathered[index] = _gather(rule, baseline, candidate, settings, seed)
        except ComparisonInvalid as problem:
            # Kept out of Holm's count: it fails at any level, so it must not make the others
            # harder.
            judged[index] = _refused(rule, str(problem))
    # At the hardest level of the correction, which does not depend on what was found.
    hardest = settings.significance / max(1, len(gathered) if settings.correction == "holm" else 1)
    for evidence in gathered.values():
        prompts = evidence.grouped.clusters
        say(
            f"{rule_name(evidence.rule)}: with {prompts} prompts, a model as good as the baseline "
            f"passes the margin of {evidence.rule.margin:g} in {evidence.power(hardest):.0%} of "
            "cases"
        )
    for index, level in _levels(gathered, settings):
        judged[index] = _judged(gathered[index], level)
    # Holm's order is by p-value; a reader expects that of the settings.
    return [judged[index] for index in sorted(judged)]


def _levels(
    gathered: dict[int, _Evidence], settings: PromoteSettings
) -> Sequence[tuple[int, float]]:
    """Rules with the level at which each is tested: Holm's steps stop at the first failure."""
    if settings.correction == "none":
        # Valid for the decision as it stands: promotion asks that all rules hold, and a conjunction
        # of tests at alpha errs at most with alpha.
        return [(index, settings.significance) for index in gathered]
    # Holm: the smallest p-value is tested at alpha / m, the next at alpha / (m - 1), and from the
    # first failure on the level stays. Ties go in the order of the settings.
    levels: list[tuple[int, float]] = []
    remaining = len(gathered)
    for index in sorted(gathered, key=lambda index: (gathered[index].p_value, index)):
        level = settings.significance / remaining
        levels.append((index, level))
        if gathered[index].p_value <= level:
            remaining -= 1
    return levels
