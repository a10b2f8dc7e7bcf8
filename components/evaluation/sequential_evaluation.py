"""An evaluation that stops when one metric has decided (see `statistics.sequential`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from components.evaluation.measuring.evaluation_run import OpenedMetrics
from components.evaluation.statistics.sequential import (
    FEWEST_PROMPTS,
    Look,
    boundaries,
    drawn_order,
    look,
    look_sizes,
    paired_differences,
)
from components.evaluation.suites.against_baseline import LEVEL
from components.evaluation.suites.suite_scores import SuiteResult
from components.evaluation.suites.suites import Suite
from components.metrics.cards import card


def check_stopping(
    metric: str, opened: OpenedMetrics, baseline: str | None, systems: Sequence[str]
) -> None:
    """Refuse before anything is made what no look could decide.

    Raises:
        ValueError: no baseline, no other system, or a metric that is not or cannot be measured, or
            is of sets.
    """
    if baseline is None or len(systems) < 2:
        raise ValueError("--stop-when-decided compares: name two systems, and one as --baseline")
    if card(metric).needs == "set pair":
        raise ValueError(f"--stop-when-decided {metric}: of sets; take a metric of pictures")
    if metric in opened.unavailable:
        raise ValueError(f"--stop-when-decided {metric}: {opened.unavailable[metric]}")
    if metric not in opened.ids:
        raise ValueError(f"--stop-when-decided {metric}: not among the metrics that are measured")


def evaluate_until_decided(
    suite: Suite,
    measure: Callable[[Suite], SuiteResult],
    metric: str,
    *,
    baseline: str,
    looks: int,
    seed: int,
) -> tuple[Suite, SuiteResult]:
    """Measure growing parts of a suite, in a drawn order of its prompts.

    Every other system gets an equal share of the level (Bonferroni), since each is a comparison of
    its own; a system that is decided stays so.

    Args:
        suite: all of it.
        measure: of a part; what an earlier part measured is in its ledger.
        metric: id of a card.
        baseline: name of a system.
        looks: groups of prompts, of equal sizes.
        seed: of the order.

    Returns:
        The part that was measured last and its result, with `looks` and a note for a reader.

    Raises:
        ValueError: too few prompts for so many looks, or values that are not finite.
    """
    order = drawn_order([item.prompt for item in suite.items], seed)
    sizes = look_sizes(len(order), looks)
    decided: dict[str, Look] = {}
    few: dict[str, int] = {}
    is_stopped = False
    edges: tuple[float, ...] = ()
    part, result = suite, None
    for number, size in enumerate(sizes, start=1):
        seen = set(order[:size])
        part = replace(
            suite,
            items=tuple(item for item in suite.items if item.prompt in seen),
            protocol=suite.protocol
            if size == len(order)
            else f"{suite.protocol}+drawn{size}of{len(order)}",
        )
        result = measure(part)
        values = _by_prompt(result, metric)
        others = sorted(set(result.table["system"]) - {baseline})
        if result.failed_systems:
            break
        if not edges:
            shares = [count / len(order) for count in sizes]
            edges = boundaries(shares, LEVEL / len(others))
        for name in others:
            if name in decided and decided[name].is_decided:
                continue
            found = paired_differences(values.get(name, {}), values.get(baseline, {}), order[:size])
            few[name] = len(found)
            if len(found) < FEWEST_PROMPTS:
                continue
            decided[name] = look(found, len(order), number, edges[number - 1])
        is_stopped = all(name in decided and decided[name].is_decided for name in others)
        if is_stopped:
            break
    assert result is not None
    result.looks = decided
    result.notes += [sentence(one, name, baseline, metric, looks) for name, one in decided.items()]
    result.notes += [
        f"not decided after {size} of {len(order)} prompts: {name} and {baseline} have values of "
        f"{card(metric).name} for {count} of them, and a look needs {FEWEST_PROMPTS}"
        for name, count in few.items()
        if name not in decided
    ]
    if is_stopped and len(part.items) < len(suite.items):
        result.notes.append(
            "stopped early: other p-values and intervals of this result do not know that the "
            "number of prompts depended on what was found"
        )
    return part, result


def _by_prompt(result: SuiteResult, metric: str) -> dict[str, dict[str, float]]:
    """Mean of the metric by system and prompt."""
    rows = result.table[(result.table["metric"] == metric) & result.table["value"].notna()]
    return {
        str(system): {
            str(prompt): float(value)
            for prompt, value in ours.groupby("prompt")["value"].mean().items()
        }
        for system, ours in rows.groupby("system")
    }


def sentence(one: Look, system: str, baseline: str, metric: str, looks: int) -> str:
    """What a look comes to."""
    found = card(metric)
    d = found.decimals
    interval = f"{one.difference:+.{d}f} [{one.low:+.{d}f}, {one.high:+.{d}f}]"
    where = f"{found.name} of {system} minus {baseline}: {interval}"
    if not one.is_decided:
        return f"not decided after {one.prompts} of {one.of} prompts: {where}"
    word = {"higher": "better", "lower": "worse", "neither": "higher"}[found.direction]
    if one.difference < 0:
        word = {"better": "worse", "worse": "better", "higher": "lower"}[word]
    return (
        f"decided after {one.prompts} of {one.of} prompts (look {one.number} of {looks}): {system} "
        f"is {word}; {where}, repeated 95% interval"
    )
