"""The table of an ablation: the paper's columns with ours beside the published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from components.evaluation.statistics.comparison import Comparison, compare_systems
from components.evaluation.statistics.scores import GENERATED, values_of
from components.evaluation.suites.ablation import Arm, Design
from components.metrics.cards import card
from components.metrics.paper_tables import paper_table
from components.metrics.published import PublishedTable

PUBLISHED: dict[Design, PublishedTable] = {
    "ladder": paper_table("ablation"),
    "data-model": paper_table("data-model"),
}
_NOTHING = "–"


@dataclass(frozen=True)
class ArmScores:
    """What is known of an arm."""

    arm: Arm
    table: pd.DataFrame | None = None
    """Scores of its pictures; None where it did not finish."""
    of_sets: dict[str, float] = field(default_factory=dict)
    """Numbers of the whole set, such as FID, by metric id."""
    problem: str = ""
    """Why there are no scores; one line."""

    @property
    def generated(self) -> pd.DataFrame:
        """Rows of pictures that the arm's model made."""
        assert self.table is not None
        return self.table[self.table["system"] == GENERATED]

    def mean(self, metric: str) -> float | None:
        """Of a metric over its pictures, or the number of the set; None: not measured."""
        if self.table is None:
            return None
        if metric in self.of_sets:
            return self.of_sets[metric]
        values = values_of(self.generated, GENERATED, metric)["value"]
        return float(values.mean()) if len(values) else None


def ablation_table(
    design: Design, scores: Sequence[ArmScores], *, resamples: int, seed: int
) -> str:
    """Markdown: the paper's columns with ours and theirs, further metrics, paired differences.

    Args:
        design: whose published table stands beside ours.
        scores: of the arms that were run, in order; at least one.
        resamples: of intervals and tests.
        seed: of both.
    """
    published = PUBLISHED[design]
    rows = {row.system: row.values for row in published.rows}
    found = {m for one in scores if one.table is not None for m in one.generated["metric"]}
    further = sorted(found - set(published.metrics))
    heads = [f"{name}, {side}" for name in published.columns for side in ("ours", "paper")]
    heads += [f"{card(metric).name} {card(metric).arrow}".rstrip() for metric in further]
    lines = [f"| {published.caption.split(',')[0]} | {' | '.join(heads)} |"]
    lines.append("|---|" + "---:|" * len(heads))
    for one in scores:
        cells: list[str] = []
        for metric, theirs in zip(published.metrics, rows[one.arm.name], strict=True):
            cells += [_number(one.mean(metric)), theirs]
        cells += [_number(one.mean(metric)) for metric in further]
        lines.append(f"| {one.arm.label} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Paper: {published.source} ({published.caption}). Other pictures, weights and sizes than "
        "ours: compare the steps between rows, not the levels.",
    ]
    lines += [f"{one.arm.name}: no numbers: {one.problem}" for one in scores if one.problem]
    return "\n".join([*lines, *_differences(scores, resamples, seed)]) + "\n"


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4g}"


def _differences(scores: Sequence[ArmScores], resamples: int, seed: int) -> list[str]:
    """Lines on each later arm against the first that has numbers."""
    finished = [one for one in scores if one.table is not None]
    if len(finished) < 2:
        return []
    first = finished[0]
    lines = ["", f"Paired differences to '{first.arm.label}', prompts as units, Holm per arm:", ""]
    for one in finished[1:]:
        shared = sorted(set(first.generated["metric"]) & set(one.generated["metric"]))
        compared = compare_systems(
            first.generated, one.generated, shared, resamples=resamples, seed=seed
        )
        for found in compared:
            if isinstance(found, Comparison):
                d = found.difference
                lines.append(
                    f"- {one.arm.label}, {found.metric}: {d.mean:+.4g} [{d.low:+.4g}, "
                    f"{d.high:+.4g}], p = {found.adjusted_p:.3g}, n = {d.n}"
                )
            else:
                lines.append(f"- {one.arm.label}: not compared: {found.reason}")
    return lines
