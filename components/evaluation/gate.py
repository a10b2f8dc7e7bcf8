"""The promotion gate: a pure function from measured numbers to a decision.

No dates and no run names enter the decision, so the same numbers and settings give the same
bytes. A missing or non-finite number fails its rule: absence of evidence never promotes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from components.settings import PromoteSettings

RULES: tuple[tuple[str, str], ...] = (
    ("vae_psnr_gain_db", "min_vae_psnr_gain_db"),
    ("validation_loss_drop", "min_validation_loss_drop"),
)
"""(metric, settings field holding its lower bound)."""


def _judge(metric: str, value: float | None, threshold: float) -> dict[str, Any]:
    measured = value is not None and math.isfinite(value)
    margin = float(value) - threshold if measured and value is not None else None
    return {
        "name": metric,
        "value": float(value) if measured and value is not None else None,
        "threshold": threshold,
        "passed": margin is not None and margin >= 0.0,
        "margin": margin,
    }


def decide(
    metrics: Mapping[str, float | None],
    settings: PromoteSettings,
    digests: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Decide whether the models behind `metrics` may take the alias `settings.alias`.

    Args:
        metrics: flat numbers of `data/evaluate/metrics.json`; `vae_psnr_gain_db` in dB and
            `validation_loss_drop` as a fraction are read.
        settings: lower bounds.
        digests: model name to content digest, copied into the decision.

    Returns:
        JSON-ready `{promoted, alias, rules: [{name, value, threshold, passed, margin}], digests}`;
        every rule is evaluated, `promoted` is their conjunction.
    """
    rules = [
        _judge(metric, metrics.get(metric), float(getattr(settings, bound)))
        for metric, bound in RULES
    ]
    return {
        "promoted": all(rule["passed"] for rule in rules),
        "alias": settings.alias,
        "rules": rules,
        "digests": dict(sorted((digests or {}).items())),
    }
