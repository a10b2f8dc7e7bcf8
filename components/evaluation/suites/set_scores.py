"""Numbers of sets, of all pictures and of each stratum, against the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from components.evaluation.measuring.evaluation_run import (
    EvaluationRun,
    Found,
    OpenedMetrics,
    feature_key,
    find_picture,
)
from components.evaluation.measuring.ledger import Ledger
from components.evaluation.statistics.set_comparison import MOST_ROWS
from components.evaluation.suites.suites import SuiteItem
from components.metrics.cards import card
from components.metrics.metric import Picture, PooledSetMetric, SetMetric

NO_SET_INTERVAL = (
    "numbers of sets (FID, KID and their kind) have no interval: at these sizes a Fréchet distance "
    "is nearly all bias, which an interval over pictures misses; compare systems by the exchange "
    "test of --baseline"
)
_MOVERS = 3
_FEWEST_LEFT = 3


def groups(items: Sequence[SuiteItem]) -> dict[str, list[SuiteItem]]:
    """All items under "", and those of each stratum where there are several."""
    strata = sorted({item.stratum for item in items})
    found = {"": list(items)}
    if len(strata) > 1:
        found |= {name: [item for item in items if item.stratum == name] for name in strata}
    return found


class ReferenceFiles:
    """Digests of reference files, each read once."""

    def __init__(self) -> None:
        self._found: dict[Path, Found] = {}

    @property
    def found(self) -> list[Found]:
        """Those that were needed."""
        return list(self._found.values())

    def _find(self, path: Path) -> Found:
        if path not in self._found:
            self._found[path] = find_picture(path)
        return self._found[path]

    def picture(self, item: SuiteItem, found: Found) -> Picture:
        """A system's picture with what it is compared with."""
        reference = None if item.reference is None else self._find(item.reference)
        return Picture(
            path=found.path,
            sha256=found.sha256,
            prompt=item.prompt,
            reference=item.reference,
            reference_content=None if reference is None else reference.content,
            reading=found.reading,
        )

    def as_they_are(self, items: Sequence[SuiteItem]) -> list[Picture]:
        """The distinct readable references of these items."""
        paths = dict.fromkeys(i.reference for i in items if i.reference is not None)
        files = [self._find(path) for path in paths]
        return [Picture(f.path, f.sha256, reading=f.reading) for f in files if f.error is None]

    def fitted(self, items: Sequence[SuiteItem]) -> list[Picture]:
        """The same, each at the size of its item; one that has the size is as it is."""
        made: dict[str, Picture] = {}
        for item in items:
            if item.reference is None:
                continue
            file = self._find(item.reference)
            if file.error is not None:
                continue
            size = (item.height, item.width)
            fitted = None if (file.height, file.width) == size else size
            picture = Picture(file.path, file.sha256, reading=file.reading, fitted=fitted)
            made.setdefault(picture.content, picture)
        return list(made.values())

    def needed(self, opened: OpenedMetrics, items: Sequence[SuiteItem]) -> list[Picture]:
        """Everything whose features some set metric reads."""
        pictures: dict[str, Picture] = {}
        for metric in opened.metrics:
            if isinstance(metric, SetMetric):
                fits = card(metric.ids[0]).fits_references
                some = self.fitted(items) if fits else self.as_they_are(items)
                pictures |= {picture.content: picture for picture in some}
        return list(pictures.values())


def set_numbers(
    run: EvaluationRun,
    opened: OpenedMetrics,
    system: str,
    pictures: Mapping[str, Picture],
    items: Sequence[SuiteItem],
    references: ReferenceFiles,
) -> tuple[dict[str, float], dict[str, str]]:
    """(`<system>[.<stratum>].<metric>` with `_n` pictures, reasons of metrics without a number).

    Args:
        run: that measured the features.
        opened: metrics.
        system: name.
        pictures: readable ones by item.
        items: of the suite.
        references: of the suite.
    """
    metrics: dict[str, float] = {}
    missing: dict[str, str] = {}
    for stratum, chosen in groups(items).items():
        ours = [pictures[item.id] for item in chosen if item.id in pictures]
        values, reasons = run.combine(
            ours, references.as_they_are(chosen), references.fitted(chosen)
        )
        prefix = f"{system}.{stratum}" if stratum else system
        for name, value in values.items():
            metrics |= {f"{prefix}.{name}": value, f"{prefix}.{name}_n": float(len(ours))}
        # A stratum that is too small leaves the number of the whole set.
        if not stratum:
            missing |= reasons
    return metrics, missing


def set_movers(
    opened: OpenedMetrics,
    ledger: Ledger,
    pictures: Mapping[str, Picture],
    references: ReferenceFiles,
    items: Sequence[SuiteItem],
) -> list[str]:
    """A line per plain distance: the prompts without which it changes most.

    Left out are all pictures of a prompt, the references stay; each distance comes from the Gram
    matrix of one pool, so that this costs the singular values of one small matrix per prompt.
    """
    lines = []
    for metric in opened.metrics:
        if not isinstance(metric, PooledSetMetric):
            continue
        fits = card(metric.ids[0]).fits_references
        theirs = references.fitted(items) if fits else references.as_they_are(items)
        prompts = [item.prompt for item in items if item.id in pictures]
        ours = [pictures[item.id] for item in items if item.id in pictures]
        keys = [feature_key(metric, picture) for picture in (*ours, *theirs)]
        known = ledger.find_features(keys)
        blocks = [known[key] for key in keys if key in known]
        total = sum(len(block) for block in blocks)
        whole = len(blocks) == len(keys) and len(set(prompts)) > _FEWEST_LEFT and theirs
        if not whole or total > MOST_ROWS or total - sum(map(len, blocks[: len(ours)])) < 2:
            continue
        ends = np.cumsum([len(block) for block in blocks])
        rows = np.split(np.arange(total), ends[:-1])
        target = np.concatenate(rows[len(ours) :])
        for metric_id, distance in metric.pooled(np.concatenate(blocks)).items():
            everything = distance(np.concatenate(rows[: len(ours)]), target)
            moves = {}
            for prompt in dict.fromkeys(prompts):
                left = [row for row, its in zip(rows, prompts, strict=False) if its != prompt]
                moves[prompt] = distance(np.concatenate(left), target) - everything
            named = sorted(moves, key=lambda prompt: -abs(moves[prompt]))[:_MOVERS]
            decimals = card(metric_id).decimals
            shown = ", ".join(f"{moves[p]:+.{decimals}f} without “{p[:60]}”" for p in named)
            lines.append(f"{card(metric_id).name} {everything:.{decimals}f} moves most: {shown}")
    return lines
