"""What `ultraflux evaluate` prints: our numbers, published ones beside them, and tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.command_line import print_json
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from components.evaluation.statistics.comparison import Comparison
    from components.evaluation.statistics.set_comparison import SetComparison
    from components.evaluation.suites.suite_scores import SuiteResult
    from components.evaluation.suites.suites import Suite

_MANY_METRICS, _FEW_SYSTEMS = 5, 4
"""From more metrics on, those of at most so many systems stand in rows."""


def _number(metrics: dict[str, float], name: str, decimals: int) -> str:
    from components.evaluation.suites.suite_scores import count_note

    note = count_note(metrics, name)
    value = metrics.get(name)
    if value is None:
        return f"∞ ({note})" if note else "-"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    text = f"{value:.{decimals}f}"
    if low is not None and high is not None:
        text = f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"
    return f"∞ ({note}; {text} over the others)" if note else text


def measured_table(metrics: dict[str, float], ids: tuple[str, ...], rows: list[str]) -> Table:
    """Means of systems (and their strata) by metric.

    Many metrics of a few systems stand in rows: in columns their names would be cut to pieces.
    """
    from components.metrics.cards import card

    cells = {
        (row, i): _number(metrics, f"{row}.{i}", card(i).decimals) for row in rows for i in ids
    }
    names = {i: f"{card(i).name} {card(i).arrow}" for i in ids}
    across = len(ids) > _MANY_METRICS and len(rows) <= _FEW_SYSTEMS
    if across:
        columns = ["metric", *rows]
        lines = [(name, *(cells[row, i] for row in rows)) for i, name in names.items()]
    else:
        columns = ["system", *names.values()]
        lines = [(row, *(cells[row, i] for i in ids)) for row in rows]
    # Names stay whole; numbers wrap.
    return table_of(columns, lines, left=(0,), whole=(0,))


def show_result(suite: Suite, result: SuiteResult, ids: tuple[str, ...]) -> None:
    """Our numbers, published ones beside them, and what is missing."""
    from components.evaluation.pages.suite_tables import comparisons, paper_beside

    console = terminal()
    systems = sorted(set(result.table["system"]))
    strata = sorted(set(result.table["stratum"]))
    endings = ("", "_infinite")
    measured = tuple(
        i
        for i in ids
        if any(key.endswith(f".{i}{end}") for key in result.metrics for end in endings)
    )
    titles = {
        f"{suite.title} ({len(suite.items)} items)": [
            s for s in systems if s not in result.other_sizes
        ]
    }
    titles |= {
        f"Not at the suite's sizes, so not comparable with it: {result.other_sizes[s]}": [s]
        for s in systems
        if s in result.other_sizes
    }
    for title, shown in titles.items():
        rows = [
            row
            for name in shown
            for row in (name, *(f"{name}.{s}" for s in strata if len(strata) > 1))
        ]
        if shown:
            # Not as the table's title, which wraps at the width of its columns.
            console.print(title, markup=False, soft_wrap=True)
            console.print(measured_table(result.metrics, measured, rows))
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    published = paper_beside(suite.name, suite.protocol)
    if published is not None:
        beside = table_of(
            ("system", *published.columns),
            ((row.title, *row.values) for row in published.rows),
            title=f"Published, other pictures and weights: {published.caption} "
            f"({published.source})",
            left=(0,),
        )
        console.print(beside)
        console.print(comparisons(published, suite.protocol), markup=False, soft_wrap=True)
    for metric_id, reason in result.unavailable.items():
        console.print(f"not measured: {metric_id}: {reason}", markup=False, soft_wrap=True)


def _cells(
    found: Comparison | SetComparison,
    difference: float,
    adjusted: float,
    interval: tuple[float, float] | None = None,
) -> tuple[str, ...]:
    from components.evaluation.suites.against_baseline import verdict
    from components.metrics.cards import card

    metric = card(found.metric)
    levels = (f"{value:.{metric.decimals}f}" for value in (found.before, found.after))
    ends = (
        "" if interval is None else " [{:+.{d}f}, {:+.{d}f}]".format(*interval, d=metric.decimals)
    )
    stratum = getattr(found, "stratum", "")
    return (
        f"{metric.name}, {stratum}" if stratum else metric.name,
        *levels,
        f"{difference:+.{metric.decimals}f}{ends}",
        f"{found.p_value:.2g}",
        f"{adjusted:.2g}",
        verdict(found.metric, difference, adjusted, interval) or "-",
    )


def show_tests(result: SuiteResult, baseline: str, resamples: int, seed: int) -> None:
    """A table per system against the baseline, and what could not be compared."""
    from components.evaluation.suites.against_baseline import against_baseline

    systems = list(dict.fromkeys(picture["system"] for picture in result.pictures))
    console = terminal()
    if baseline not in systems:
        console.print(f"not compared: {baseline} has no pictures", markup=False, soft_wrap=True)
        return
    for one in against_baseline(
        result.table, systems, baseline, result.set_comparisons, resamples=resamples, seed=seed
    ):
        rows = [
            _cells(
                found,
                found.difference.mean,
                found.adjusted_p,
                (found.difference.low, found.difference.high),
            )
            for found in one.comparisons
        ]
        rows += [_cells(distance, distance.difference, adjusted) for distance, adjusted in one.sets]
        columns = ("metric", baseline, one.system, "difference", "p", "p, Holm", "at 5%")
        if rows:
            title = f"{one.system} against {baseline}"
            console.print(table_of(columns, rows, title=title, left=(0,)))
        refusals = (*one.refusals, *result.set_refusals.get(one.system, ()))
        for line in not_compared(one.system, [refusal.reason for refusal in refusals]):
            console.print(line, markup=False, soft_wrap=True)


def print_result(
    suite: Suite,
    result: SuiteResult,
    scores: Path,
    baseline: str | None,
    resamples: int,
    seed: int,
) -> None:
    """What `show_result` and `show_tests` print, as one JSON object."""
    from components.evaluation.suites.against_baseline import against_baseline, verdict
    from components.evaluation.suites.result_folder import finite
    from components.evaluation.suites.suite_scores import statistics_of

    tests = []
    measured = {picture["system"] for picture in result.pictures}
    compared = (
        against_baseline(
            result.table,
            sorted(measured),
            baseline,
            result.set_comparisons,
            resamples=resamples,
            seed=seed,
        )
        if baseline in measured and baseline is not None
        else []
    )
    for one in compared:
        for found in one.comparisons:
            ends = found.difference.low, found.difference.high
            said = verdict(found.metric, found.difference.mean, found.adjusted_p, ends)
            tests.append({"system": one.system, **asdict(found), "verdict": said})
        for distance, adjusted in one.sets:
            said = verdict(distance.metric, distance.difference, adjusted)
            row = {**asdict(distance), "difference": distance.difference}
            tests.append({**row, "adjusted_p": adjusted, "verdict": said})
        refused = (*one.refusals, *result.set_refusals.get(one.system, ()))
        tests += [{"system": one.system, **asdict(refusal)} for refusal in refused]
    errors = result.table[result.table["error"].notna()]
    described = {
        "suite": suite.name,
        "protocol": suite.protocol,
        "items": len(suite.items),
        "metrics": result.metrics,
        "baseline": baseline,
        "tests": tests,
        "other_sizes": result.other_sizes,
        "notes": result.notes,
        "unavailable": result.unavailable,
        "errors": errors[["system", "item", "metric", "error"]].to_dict("records"),
        "failed_systems": result.failed_systems,
        "statistics": statistics_of(result),
        "scores": str(scores),
    }
    print_json(finite(described))


def not_compared(system: str, reasons: list[str]) -> Iterator[str]:
    """A line for each reason, with the metrics that it holds for."""
    metrics: dict[str, list[str]] = {}
    for text in reasons:
        metric, separator, reason = text.partition(": ")
        metrics.setdefault(reason if separator else text, []).append(metric if separator else "")
    for reason, names in metrics.items():
        listed = ", ".join(filter(None, names))
        yield f"not compared: {system}: {f'{listed}: ' if listed else ''}{reason}"
