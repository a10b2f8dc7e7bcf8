"""The metric tables of an evaluation's page: the papers' layout, ours, and sizes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from components.evaluation.pages.evaluation_files import Evaluation
from components.evaluation.pages.report_page import (
    Cell,
    Row,
    Table,
    column_name,
    fixed,
    published_rows,
)
from components.evaluation.suites.suite_scores import count_note
from components.evaluation.suites.suites import not_of_suite
from components.metrics.cards import card
from components.metrics.paper_tables import table_of_suite
from components.metrics.published import PublishedTable


def _cell(evaluation: Evaluation, prefix: str, metric: str, pictures: int) -> Cell:
    """A mean with its interval, and of how many pictures it is where that is not all."""
    name = f"{prefix}.{metric}"
    values = evaluation.metrics
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    interval = (
        "" if low is None or high is None else f"{fixed(low, metric)} to {fixed(high, metric)}"
    )
    value, note = fixed(values.get(name), metric), count_note(values, name)
    count = int(values.get(f"{name}_n", 0.0) + values.get(f"{name}_infinite", 0.0))
    if name in values and 0 < count != pictures and card(metric).needs != "set pair":
        interval = f"{interval}, n = {count}" if interval else f"n = {count}"
    if not note:
        return Cell(value, interval)
    # An infinite value is the best or the worst there is: it stands first, the others' mean below.
    others = f"; the others {value} {f'({interval})' if interval else ''}".rstrip()
    return Cell("∞", note + (others if name in values else ""))


def _strata(evaluation: Evaluation) -> list[str]:
    """Strata of the suite, if several."""
    strata = sorted(set(evaluation.table["stratum"]))
    return strata if len(strata) > 1 else []


def _rank(evaluation: Evaluation, prefix: str, metric: str) -> tuple[float, float] | None:
    """Larger is better: share of pictures with an infinite value first, then the others' mean."""
    name, values = f"{prefix}.{metric}", evaluation.metrics
    infinite = values.get(f"{name}_infinite", 0.0)
    sign = {"higher": 1.0, "lower": -1.0, "neither": 0.0}[card(metric).direction]
    if not sign or (name not in values and not infinite):
        return None
    share = infinite / (infinite + values.get(f"{name}_n", 0.0)) if infinite else 0.0
    return sign * share, sign * values.get(name, 0.0)


def _best(evaluation: Evaluation, prefixes: Sequence[str], metric: str) -> set[str]:
    """Whose number is the best of several; none where only one has a number."""
    ranks = {prefix: _rank(evaluation, prefix, metric) for prefix in prefixes}
    known = {prefix: rank for prefix, rank in ranks.items() if rank is not None}
    if len(known) < 2:
        return set()
    return {prefix for prefix, rank in known.items() if rank == max(known.values())}


def _ours(
    evaluation: Evaluation, systems: Sequence[str], metrics: Sequence[str], stratum: str = ""
) -> list[Row]:
    """A row per system, over all of its pictures or those of one stratum."""
    rows = []
    prefixes = [f"{system}.{stratum}" if stratum else system for system in systems]
    best = {metric: _best(evaluation, prefixes, metric) for metric in metrics}
    for index, system in enumerate(systems):
        scores = evaluation.table[evaluation.table["system"] == system]
        prefix, name = system, system
        if stratum:
            scores = scores[scores["stratum"] == stratum]
            prefix, name = f"{system}.{stratum}", f"{stratum}, {system}"
        # An unreadable picture has rows, and no value in any of them.
        pictures = scores[scores["value"].notna()]["item"].nunique()
        cells = tuple(
            replace(_cell(evaluation, prefix, metric, pictures), best=prefix in best[metric])
            for metric in metrics
        )
        label = f"{name} (n = {pictures})"
        rows.append(Row(label, cells, first_ours=index == 0))
    return rows


def _table(
    evaluation: Evaluation,
    caption: str,
    columns: tuple[str, ...],
    metrics: Sequence[str],
    *,
    source: str = "",
    published: Sequence[Row] = (),
    systems: Sequence[str] | None = None,
) -> Table:
    strata = _strata(evaluation)
    if systems is None:
        systems = [name for name in evaluation.systems if name not in evaluation.other_sizes]
    return Table(
        caption,
        source,
        "System",
        columns,
        (*published, *_ours(evaluation, systems, metrics)),
        tuple(row for stratum in strata for row in _ours(evaluation, systems, metrics, stratum)),
        len(strata),
    )


def paper_beside(suite: str, protocol: str) -> PublishedTable | None:
    """The published table of a suite or a part of it; None: another suite, or it has none."""
    whole = protocol.partition("+")[0]
    return None if not_of_suite(suite, suite, whole) else table_of_suite(suite)


def comparisons(paper: PublishedTable, protocol: str) -> str:
    """Which columns compare with ours, by protocol id, and why the others do not.

    Args:
        paper: as `paper_beside` gives it.
        protocol: of the suite or the part of it that ours were measured on.
    """
    part = not_of_suite(paper.suite, paper.suite, protocol)
    equal: list[str] = []
    other: dict[str, list[str]] = {}
    for place, (column, metric) in enumerate(zip(paper.columns, paper.metrics, strict=True)):
        reason = part or paper.comparison(place, card(metric).protocol)
        if reason:
            other.setdefault(reason, []).append(column)
        else:
            equal.append(column)
    parts = [f"Equal protocol ids: {', '.join(equal)}"] if equal else []
    parts += [f"Not comparable: {', '.join(names)} ({reason})" for reason, names in other.items()]
    wanted = f". Made with: {paper.wants}" if paper.wants else ""
    return "; ".join(parts) + wanted


def metric_tables(evaluation: Evaluation) -> list[Table]:
    """The paper's layout where the suite has one, and a table of all other metrics."""
    tables = []
    rest = evaluation.measured
    paper = paper_beside(evaluation.suite, evaluation.protocol)
    if paper is not None:
        tables.append(
            _table(
                evaluation,
                paper.caption,
                paper.columns,
                paper.metrics,
                source=f"{paper.source}. {comparisons(paper, evaluation.protocol)}",
                published=published_rows(paper),
            )
        )
        rest = [metric for metric in rest if metric not in paper.metrics]
    if rest:
        columns = tuple(column_name(metric) for metric in rest)
        caption = "Means over pictures, 95% intervals below; the compression ratio is of the set"
        tables.append(_table(evaluation, caption, columns, rest))
    columns = tuple(column_name(metric) for metric in evaluation.measured)
    for system, sizes in evaluation.other_sizes.items():
        caption = f"Not at the suite's sizes, so not comparable with it: {sizes}"
        tables.append(_table(evaluation, caption, columns, evaluation.measured, systems=(system,)))
    return tables
