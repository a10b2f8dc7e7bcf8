"""The promotion gate: a pure function from measured numbers to a decision.

No dates and no run names enter the decision, so the same numbers and settings give the same
bytes. A missing or non-finite number fails its rule: absence of evidence never promotes. Rules are
absolute bounds, and non-inferiority to a baseline once there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from components.evaluation.statistics.non_inferiority import judge_non_inferiority, rule_name
from components.settings.evaluation import PromoteSettings

# Gains, not absolute levels: levels depend on the profile's models and sizes.
RULES: tuple[tuple[str, str], ...] = (
    ("vae_psnr_gain_db", "min_vae_psnr_gain_db"),
    ("validation_loss_drop", "min_validation_loss_drop"),
    ("training_images_loss_drop", "min_training_images_loss_drop"),
    ("twin_psnr_db_worst", "min_twin_psnr_db"),
)
"""(metric, settings field holding its lower bound; None there: not asked)."""


def _judge(metric: str, value: float | None, threshold: float) -> dict[str, Any]:
    # Infinity would pass any bound, and NaN is no JSON: neither is a measurement.
    measured = value is not None and math.isfinite(value)
    margin = float(value) - threshold if measured and value is not None else None
    return {
        "name": metric,
        "kind": "bound",
        "value": float(value) if measured and value is not None else None,
        "threshold": threshold,
        "passed": margin is not None and margin >= 0.0,
        "margin": margin,
    }


def decide(
    metrics: Mapping[str, float | None],
    settings: PromoteSettings,
    digests: Mapping[str, str] | None = None,
    *,
    candidate: pd.DataFrame | None = None,
    baseline: pd.DataFrame | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Decide whether the models behind `metrics` may take the alias `settings.alias`.

    Args:
        metrics: flat numbers of `data/evaluate/metrics.json`; `vae_psnr_gain_db` and
            `twin_psnr_db_worst` in dB, `validation_loss_drop` and `training_images_loss_drop` as
            fractions, `twins` and `twins_recognised` as counts are read.
        settings: lower bounds, and rules of non-inferiority.
        digests: model name to content digest, copied into the decision.
        candidate: scores table behind `metrics`; needed with a baseline.
        baseline: scores table of the baseline; None: there is none yet.
        seed: of the bootstrap.
        say: gets the power of each comparison before it is decided.

    Returns:
        JSON-ready `{promoted, alias, rules: [{name, kind, value, threshold, passed, margin, ...}],
        baseline, not_compared, digests}`; every rule is evaluated, `promoted` is their conjunction.
        `baseline` is the digest of its file or None, `not_compared` names the rules that wait for
        a baseline.
    """
    rules = [
        # `get`: a number that was never written fails its rule; a KeyError would leave no decision.
        _judge(metric, metrics.get(metric), float(bound))
        for metric, bound in ((name, getattr(settings, field)) for name, field in RULES)
        if bound is not None
    ]
    if settings.min_twin_psnr_db is not None:
        # All of them, however many there are; where that is not known, none is enough.
        twins = metrics.get("twins")
        known = twins is not None and math.isfinite(twins)
        recognised = metrics.get("twins_recognised") if known else None
        rules.append(_judge("twins_recognised", recognised, float(twins or 1.0) if known else 1.0))
    if baseline is not None:
        # A baseline with nothing to hold against it must not pass for "no baseline".
        if candidate is None:
            raise ValueError("a baseline needs the candidate's scores table beside it")
        rules += judge_non_inferiority(baseline, candidate, settings, seed, say)
    return {
        # All rules were judged before, also after one had failed: whoever repairs the model wants
        # every reason at once.
        "promoted": all(rule["passed"] for rule in rules),
        "alias": settings.alias,
        "rules": rules,
        # The digest and no path or date: equal inputs must give equal bytes.
        "baseline": None
        if baseline is None or settings.baseline is None
        else settings.baseline.sha256,
        # Named, not failed: else no first champion, hence no baseline, could ever exist.
        "not_compared": []
        if baseline is not None
        else [rule_name(rule) for rule in settings.non_inferiority],
        # Sorted: the bytes must not depend on the order in which a caller filled a mapping.
        "digests": dict(sorted((digests or {}).items())),
    }
