"""The cards of all metrics: what each sees, which way is better, its protocol and its weights.

A metric whose weights are absent is never approximated by another one: its card says which
command fetches them, and everything else is still measured.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from components.metrics.metric_card import MetricCard
from components.metrics.metric_weights import place_of
from components.metrics.registry import METRICS, family_of

CARDS: tuple[MetricCard, ...] = tuple(card for family in METRICS for card in family.cards)


def card(metric: str) -> MetricCard:
    """The card of one metric id.

    Raises:
        ValueError: no such metric; the message lists the known ids.
    """
    return next(found for found in family_of(metric).cards if found.id == metric)


def status(metric: MetricCard, measured: Collection[str], weights_dir: Path) -> str:
    """Why there is or is not a number for this metric, in one line.

    Args:
        metric: the card.
        measured: metric ids with at least one value.
        weights_dir: the repository's `weights/` folder; it and the caches are looked through as by
            `ultraflux weights list`, and nothing is read.
    """
    if metric.id in measured:
        return "measured"
    if metric.weights is None:
        return "no input"
    for part in (metric.weights, *metric.weights.also):
        if place_of(part, weights_dir) is None:
            return f"weights missing: {part.command}"
    return "weights found, not measured"
