"""Every system of an evaluation against one of them, metrics of pictures and of sets together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from components.evaluation.statistics.comparison import Comparison, Refusal, compare_systems
from components.evaluation.statistics.set_comparison import SetComparison
from components.metrics.cards import CARDS, card
from components.statistics.multiple_tests import holm

LEVEL = 0.05


@dataclass(frozen=True)
class AgainstBaseline:
    """One system's statistics; Holm runs over `comparisons` and `sets` of all systems together."""

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
    # Infinite ones, too: what is equal everywhere is said to be no test, and not left out.
    known = set(table.loc[table["value"].notna(), "metric"])
    metrics = [c.id for c in CARDS if c.id in known]
    found = {
        system: compare_systems(
            by_system[baseline], by_system[system], metrics, resamples=resamples, seed=seed
        )
        for system in systems
        if system != baseline
    }
    ours = [one for one in sets if one.baseline == baseline and one.system in found]
    p_values = {
        (system, one.metric, ""): one.p_value
        for system, several in found.items()
        for one in several
        if isinstance(one, Comparison)
    } | {(one.system, one.metric, one.stratum): one.p_value for one in ours}
    # Over the whole page: whoever looks through three systems and nine metrics for a difference
    # looks at 27 tests, however they are spread over tables.
    numbered = holm({str(place): p for place, p in enumerate(p_values.values())})
    adjusted = dict(zip(p_values, numbered.values(), strict=True))
    return [
        AgainstBaseline(
            system,
            tuple(
                replace(one, adjusted_p=adjusted[system, one.metric, ""])
                for one in several
                if isinstance(one, Comparison)
            ),
            tuple(
                (one, adjusted[system, one.metric, one.stratum])
                for one in ours
                if one.system == system
            ),
            tuple(one for one in several if isinstance(one, Refusal)),
        )
        for system, several in found.items()
    ]


def verdict(
    metric: str, difference: float, adjusted_p: float, interval: tuple[float, float] | None = None
) -> str:
    """What may be said of a difference at the level `LEVEL`.

    Args:
        metric: id of a card.
        difference: after - before.
        adjusted_p: after Holm over the page.
        interval: 95%, of this difference alone; None where there is none (sets).

    Returns:
        "better" or "worse"; "differs" for a metric without direction; "not after correction" where
        the interval alone excludes zero, and "undecided" where the test alone finds a difference,
        so that no cell says "no difference" beside an interval without zero; else empty.
    """
    outside = interval is not None and not interval[0] <= 0.0 <= interval[1]
    found = adjusted_p < LEVEL
    if found and interval is not None and not outside:
        return "undecided"
    if not found:
        return "not after correction" if outside else ""
    direction = card(metric).direction
    if direction == "neither":
        return "differs"
    return "better" if (difference > 0) == (direction == "higher") else "worse"
