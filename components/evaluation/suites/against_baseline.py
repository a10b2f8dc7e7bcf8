"""Every system of an evaluation against one of them, metrics of pictures and of sets together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from components.evaluation.statistics.comparison import Comparison, Refusal, compare_systems
from components.evaluation.statistics.set_comparison import SetComparison
from components.metrics.cards import CARDS, card
from components.statistics.multiple_tests import holm

LEVEL = 0.05


@dataclass(frozen=True)
class AgainstBaseline:
    """One system's statistics; Holm runs over `comparisons` and `sets` together."""

    system: str
    comparisons: tuple[Comparison, ...]
    sets: tuple[tuple[SetComparison, float], ...]
    """With the corrected p-value."""
    refusals: tuple[Refusal, ...]


def against_baseline(
    table: pd.DataFrame,
    systems: Sequence[str],
    baseline: str,
    sets: Sequence[SetComparison] = (),
    *,
    resamples: int,
    seed: int,
) -> list[AgainstBaseline]:
    """Compare each other system, in the order given.

    Args:
        table: columns of `suite_scores.COLUMNS`; `prompt` is that of the item.
        systems: names.
        baseline: one of them.
        sets: set metrics; those against another baseline are left out.
        resamples: of the bootstrap, and permutations of the test.
        seed: of both.
    """
    # File names may differ between systems; the item is what pairs two pictures.
    table = table.assign(image=table["item"])
    by_system = {name: table[table["system"] == name] for name in systems}
    finite = set(table.loc[np.isfinite(table["value"]), "metric"])
    metrics = [c.id for c in CARDS if c.id in finite]
    return [
        _one(
            system,
            compare_systems(
                by_system[baseline], by_system[system], metrics, resamples=resamples, seed=seed
            ),
            [one for one in sets if (one.baseline, one.system) == (baseline, system)],
        )
        for system in systems
        if system != baseline
    ]


def _one(
    system: str, found: Sequence[Comparison | Refusal], sets: Sequence[SetComparison]
) -> AgainstBaseline:
    comparisons = [one for one in found if isinstance(one, Comparison)]
    p_values = {one.metric: one.p_value for one in comparisons}
    adjusted = holm(p_values | {one.metric: one.p_value for one in sets})
    return AgainstBaseline(
        system,
        tuple(replace(one, adjusted_p=adjusted[one.metric]) for one in comparisons),
        tuple((one, adjusted[one.metric]) for one in sets),
        tuple(one for one in found if isinstance(one, Refusal)),
    )


def verdict(metric: str, difference: float, adjusted_p: float) -> str:
    """Either better or worse; empty where nothing was found or the metric has no direction."""
    direction = card(metric).direction
    if adjusted_p >= LEVEL or direction == "neither":
        return ""
    return "better" if (difference > 0) == (direction == "higher") else "worse"
