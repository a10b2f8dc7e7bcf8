"""Set metrics of two systems compared, from the features that the ledger holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from components.evaluation.measuring.evaluation_run import OpenedMetrics, feature_key
from components.evaluation.measuring.ledger import Ledger
from components.evaluation.statistics.comparison import Refusal
from components.evaluation.statistics.set_comparison import SetComparison, compare_sets
from components.metrics.cards import card
from components.metrics.metric import Features, Picture, SetMetric


def compare_measured_sets(
    opened: OpenedMetrics,
    ledger: Ledger,
    baseline: tuple[str, Mapping[str, Picture]],
    system: tuple[str, Mapping[str, Picture]],
    reference: Sequence[Picture],
    *,
    permutations: int,
    seed: int,
    fitted: Sequence[Picture] = (),
    stratum: str = "",
) -> tuple[list[SetComparison], list[Refusal]]:
    """Every set metric of a system against a baseline, by exchanging the pictures of a prompt.

    Args:
        opened: only its set metrics are looked at.
        ledger: holds the features of all pictures; see `EvaluationRun.measure`.
        baseline: name, and picture by item.
        system: name, and picture by item.
        reference: pictures of the reference set.
        fitted: the same for metrics whose card `fits_references`.
        stratum: what the pictures are a part of; empty: of nothing.
        permutations: at least 100.
        seed: of the exchanges.

    Returns:
        Comparisons, and a refusal for each metric that could not be compared.
    """
    found: list[SetComparison] = []
    refused: list[Refusal] = []
    for metric in opened.metrics:
        if not isinstance(metric, SetMetric):
            continue
        try:
            target = fitted if card(metric.ids[0]).fits_references else reference
            compared = _compared(metric, ledger, baseline, system, target, permutations, seed)
            found += [replace(one, stratum=stratum) for one in compared]
        except ValueError as problem:
            refused.append(Refusal(metric.ids[0], f"{metric.ids[0]}: {problem}"))
    return found, refused


def _compared(
    metric: SetMetric,
    ledger: Ledger,
    baseline: tuple[str, Mapping[str, Picture]],
    system: tuple[str, Mapping[str, Picture]],
    reference: Sequence[Picture],
    permutations: int,
    seed: int,
) -> list[SetComparison]:
    (first, before), (second, after) = baseline, system
    ours, theirs = (_features(metric, ledger, side) for side in (before, after))
    # A picture without its partner would make the sets unlike in more than their systems.
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        raise ValueError(
            f"{len(alone)} pictures have no partner, such as {alone[0]}; compare the same prompts, "
            "seeds and sizes"
        )
    target = list(_features(metric, ledger, {p.content: p for p in reference}).values())
    if not ours or not target:
        raise ValueError(f"no {'reference' if ours else 'system'} picture has features")
    # Pictures of one prompt are dependent (seeds, sizes): they change sides together.
    prompts = [before[item].prompt for item in ours]
    clusters = [prompt or f"item {item}" for prompt, item in zip(prompts, ours, strict=True)]
    compared = compare_sets(
        metric,
        list(ours.values()),
        [theirs[item] for item in ours],
        np.concatenate(target),
        permutations=permutations,
        seed=seed,
        clusters=clusters,
    )
    return [
        SetComparison(
            metric=name,
            protocol=card(name).protocol,
            baseline=first,
            system=second,
            before=near,
            after=far,
            p_value=test.p_value,
            pictures=test.n,
            prompts=test.clusters,
            permutations=test.permutations,
        )
        for name, (near, far, test) in compared.items()
    ]


def _features(
    metric: SetMetric, ledger: Ledger, pictures: Mapping[str, Picture]
) -> dict[str, Features]:
    """Features by item, in the order of the items; unreadable pictures have none."""
    keys = {item: feature_key(metric, picture) for item, picture in pictures.items()}
    known = ledger.find_features(keys.values())
    return {item: known[key] for item, key in keys.items() if key in known}
