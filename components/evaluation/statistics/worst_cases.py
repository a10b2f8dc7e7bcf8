"""Where a system loses most against another one, picture by picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from components.metrics.cards import card


@dataclass(frozen=True)
class WorstCase:
    """One picture on which `system` is worse than `baseline`."""

    metric: str
    baseline: str
    system: str
    item: str
    baseline_value: float
    value: float
    loss: float
    """In the unit of the metric, positive; infinite where one of both values is."""


def worst_cases(
    table: pd.DataFrame, baseline: str, system: str, metrics: Sequence[str], count: int
) -> list[WorstCase]:
    """The `count` largest paired losses of each metric, largest first; ties in order of item.

    Infinite losses (the baseline's picture equals the reference, the system's does not) come first,
    the worst value of the system's before the others.

    Args:
        table: scores with the columns system, item, metric and value.
        baseline: name of a system.
        system: name of the one that is looked at.
        metrics: ids; those without a better direction are left out.
        count: pictures per metric.

    Returns:
        Pictures that both systems have, with values, on which `system` is worse.
    """
    cases: list[WorstCase] = []
    for metric in metrics:
        direction = card(metric).direction
        if direction == "neither":
            continue
        rows = table[table["metric"] == metric]
        # By item, not by position: a table may lack pictures of one system.
        ours, theirs = (
            rows[rows["system"] == name].set_index("item")["value"] for name in (system, baseline)
        )
        # By item, because the sort below is stable: equal losses come in a fixed order.
        shared = sorted(set(ours.index) & set(theirs.index))
        found = []
        for item in shared:
            value, reference = float(ours.loc[item]), float(theirs.loc[item])
            # Positive means worse in either direction, so one rule ranks all metrics.
            loss = reference - value if direction == "higher" else value - reference
            # False where a value is missing, and where both are infinite.
            if loss > 0.0:
                found.append(WorstCase(metric, baseline, system, item, reference, value, loss))
        better = 1.0 if direction == "higher" else -1.0
        found.sort(key=lambda c: (-c.loss, better * c.value if math.isinf(c.loss) else 0.0))
        cases += found[:count]
    return cases


def by_rank(cases: Sequence[WorstCase]) -> list[WorstCase]:
    """The worst case of every metric, then the second ones, and so on; each item once."""
    seen: dict[str, int] = {}
    ranked = []
    for order, case in enumerate(cases):
        group = f"{case.system}/{case.metric}"
        rank = seen.get(group, 0)
        seen[group] = rank + 1
        # The order given breaks ties between metrics of one rank; cases have no order of their own.
        ranked.append((rank, order, case))
    once: dict[tuple[str, str], WorstCase] = {}
    for _, _, case in sorted(ranked, key=lambda entry: entry[:2]):
        # The first stays: a picture is shown for the metric on which it ranks worst.
        once.setdefault((case.system, case.item), case)
    return list(once.values())
