"""The page about an evaluation: systems on a suite, as `ultraflux evaluate` left them.

Reads `metrics.json`, `scores.parquet` and `pictures.jsonl` of an evaluation. The page names no
machine paths and no dates: the same evaluation and options give the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from components.evaluation.pages.charts import Series, forest_plot, line_chart
from components.evaluation.pages.evaluation_files import (
    Evaluation,
    EvaluationIncomplete,
)
from components.evaluation.pages.merged_evaluation import read_together
from components.evaluation.pages.record_tables import judge_tables, runtime_tables
from components.evaluation.pages.report_page import (
    RULE_NAMES,
    SCRIPTS,
    STYLES,
    ImageRow,
    ImageTable,
    Tile,
    assets,
    column_name,
    environment,
    fixed,
)
from components.evaluation.pages.report_pictures import Source
from components.evaluation.pages.suite_pictures import (
    Held,
    ItemSources,
    PictureOptions,
    build_viewer,
)
from components.evaluation.pages.suite_tables import metric_tables
from components.evaluation.paper_tables.records import read_judged, read_timed
from components.evaluation.statistics.comparison import Comparison, Refusal
from components.evaluation.statistics.set_comparison import SetComparison
from components.evaluation.statistics.worst_cases import WorstCase, by_rank, worst_cases
from components.evaluation.suites.against_baseline import against_baseline, verdict
from components.evaluation.viewer import Viewer
from components.metrics.cards import CARDS, card, status

REFERENCE = "(reference)"
"""What the viewer calls the pictures that pair metrics compare with; no name of a system."""
WORST_PER_METRIC = 3
_ROW_LIMIT = 2000
_MOST_BINS = 24
_SIZE = "@size@"
"""Where the page says how large it is."""
_PAGE_RESERVE_BYTES = 3_000_000
"""Of the budget, for everything that is not a picture."""


@dataclass(frozen=True)
class ReportOptions:
    """What the page compares and how large it may be."""

    baseline: str | None = None
    """System that the others are compared with; None: the first one."""
    budget_bytes: int = 60_000_000
    """Of the whole page."""
    tiles: Path | None = None
    workers: int = 1
    resamples: int = 1000
    seed: int = 0
    further: tuple[Path, ...] = ()
    """Folders of further evaluations of the suite, whose systems are compared as well."""
    judged: tuple[Path, ...] = ()
    """Folders of `ultraflux judge` that are shown."""
    timed: tuple[Path, ...] = ()
    """Folders of the runtime suite that are shown."""


@dataclass(frozen=True)
class SuiteReport:
    """A finished page."""

    html: str
    held: Held
    verdicts: tuple[str, ...] = ()
    """A sentence per system against the baseline."""


def _item_sources(evaluation: Evaluation, root: Path) -> list[ItemSources]:
    """Files by item, references first where pair metrics were measured."""
    with_reference = any(c.needs == "pair" for c in evaluation.image_metrics)
    items: dict[str, ItemSources] = {}
    for picture in evaluation.pictures:
        entry = items.setdefault(
            picture["item"], ItemSources(picture["item"], picture["prompt"], {})
        )
        entry.sources[picture["system"]] = Source(root / picture["path"], picture["sha256"])
        reference = picture["reference"]
        is_known = any(source.path == root / reference for source in entry.sources.values())
        if with_reference and reference and not is_known and (root / reference).is_file():
            digest = hashlib.sha256((root / reference).read_bytes()).hexdigest()
            entry.sources[REFERENCE] = Source(root / reference, digest)
    return list(items.values())


@dataclass(frozen=True)
class Paired:
    """Statistics of one system against the baseline."""

    system: str
    rows: tuple[tuple[Comparison, str], ...]
    """With what `verdict` says."""
    sets: tuple[tuple[SetComparison, float, str], ...]
    """Distances to the reference set, with the corrected p-value and the same."""
    refusals: tuple[Refusal, ...]


def _paired(evaluation: Evaluation, baseline: str, options: ReportOptions) -> list[Paired]:
    prompts = {picture["item"]: picture["prompt"] for picture in evaluation.pictures}
    found = against_baseline(
        evaluation.table.assign(prompt=evaluation.table["item"].map(prompts)),
        evaluation.systems,
        baseline,
        evaluation.set_comparisons,
        resamples=options.resamples,
        seed=options.seed,
    )
    return [
        Paired(
            one.system,
            tuple(
                (
                    c,
                    verdict(
                        c.metric,
                        c.difference.mean,
                        c.adjusted_p,
                        (c.difference.low, c.difference.high),
                    ),
                )
                for c in one.comparisons
            ),
            tuple((s, p, verdict(s.metric, s.difference, p)) for s, p in one.sets),
            one.refusals,
        )
        for one in found
    ]


def verdict_sentence(part: Paired, baseline: str) -> str:
    """What the comparison comes to, in one sentence."""
    said: dict[str, list[str]] = {}
    for comparison, word in part.rows:
        said.setdefault(word, []).append(card(comparison.metric).name)
    for one, _, word in part.sets:
        name = card(one.metric).name
        said.setdefault(word, []).append(f"{name} ({one.stratum})" if one.stratum else name)
    total = sum(map(len, said.values()))
    if not total:
        return f"{part.system} against {baseline}: nothing could be compared."
    words = {"better": "better in", "worse": "worse in", "differs": "different in"}
    parts = [f"{words[w]} {', '.join(said.pop(w))}" for w in tuple(words) if w in said]
    open_ones = sum(map(len, said.values()))
    found = "; ".join(parts) or "no difference found"
    rest = f"; {open_ones} of {total} undecided" if open_ones and parts else ""
    prompts = max((c.difference.clusters or 0 for c, _ in part.rows), default=0)
    over = f" over {prompts} prompts" if prompts else ""
    refused = ", ".join(card(one.metric).name for one in part.refusals)
    end = f"over the whole page{f'; not compared: {refused}' if refused else ''}."
    return f"{part.system} against {baseline}{over}: {found}{rest}, at 5% {end}"


def forest(part: Paired, baseline: str) -> Markup:
    """Differences in units of what could be detected, turned so that right is better."""
    rows = []
    for comparison, _ in part.rows:
        metric = card(comparison.metric)
        if metric.direction == "neither" or not comparison.detectable > 0.0:
            continue
        unit = comparison.detectable * (1.0 if metric.direction == "higher" else -1.0)
        found = comparison.difference
        low, high = sorted((found.low / unit, found.high / unit))
        if math.isfinite(low) and math.isfinite(high):
            rows.append((metric.name, low, found.mean / unit, high))
    label = f"{part.system} better than {baseline} →  (unit: smallest detectable difference)"
    return Markup(forest_plot(rows, x_label=label))


def histograms(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One chart per metric: pictures by value, an outline per system."""
    figures = []
    for metric in evaluation.image_metrics:
        rows = evaluation.table[evaluation.table["metric"] == metric.id]
        values = rows["value"].to_numpy(dtype=np.float64)
        finite = values[np.isfinite(values)]
        if finite.size < 2 or finite.min() == finite.max():
            continue
        # Rice's rule for the pictures of one system.
        bins = math.ceil(2 * (finite.size / len(evaluation.systems)) ** (1 / 3))
        edges = np.histogram_bin_edges(finite, bins=min(bins, _MOST_BINS))
        outlines = []
        for system in evaluation.systems:
            ours = values[(rows["system"] == system).to_numpy() & np.isfinite(values)]
            counts, _ = np.histogram(ours, bins=edges)
            x = np.repeat(edges, 2).tolist()
            y = [0.0, *np.repeat(counts, 2).astype(float).tolist(), 0.0]
            outlines.append(Series(system, x, y))
        unit = "" if metric.unit == "1" else f" ({metric.unit})"
        svg = line_chart(outlines, x_label=f"{metric.name}{unit}", y_label="pictures")
        figures.append({"title": f"{metric.name} {metric.arrow}".strip(), "svg": Markup(svg)})
    return figures


def _image_table(evaluation: Evaluation, viewer: Viewer) -> ImageTable:
    metrics = [c.id for c in evaluation.image_metrics]
    viewed = {item.id: item for item in viewer.items}
    prompts = {picture["item"]: picture["prompt"] for picture in evaluation.pictures}
    rows = []
    for _, group in evaluation.table.groupby(["system", "item"], sort=False):
        system, item = str(group["system"].iloc[0]), str(group["item"].iloc[0])
        values = dict(zip(group["metric"], group["value"], strict=True))
        cells = []
        for metric in metrics:
            value = float(values.get(metric, math.nan))
            missing = math.isnan(value)
            cells.append((None if missing else value, "–" if missing else fixed(value, metric)))
        picture = viewed[item].pictures.get(system) if item in viewed else None
        height, width = (int(group[name].iloc[0]) for name in ("height", "width"))
        rows.append(
            ImageRow(
                item,
                system,
                height,
                width,
                tuple(cells),
                thumbnail=picture.thumbnail if picture else "",
                item=item if picture else "",
                detail=prompts.get(item, ""),
            )
        )
    order = {name: index for index, name in enumerate(evaluation.systems)}
    rows.sort(key=lambda row: (row.image, order[row.system]))
    columns = tuple(column_name(metric) for metric in metrics)
    return ImageTable("All pictures", columns, tuple(rows[:_ROW_LIMIT]), len(rows))


def _worst_groups(cases: Sequence[WorstCase]) -> list[dict[str, Any]]:
    """Cases by metric and system, with texts for the page."""
    groups: dict[tuple[str, str], list[WorstCase]] = {}
    for case in cases:
        groups.setdefault((case.metric, case.system), []).append(case)
    return [
        {
            "title": f"{column_name(metric)}: {system} against {found[0].baseline}",
            "cases": [
                {
                    "case": case,
                    "loss": fixed(case.loss, metric),
                    "value": fixed(case.value, metric),
                    "baseline_value": fixed(case.baseline_value, metric),
                }
                for case in found
            ],
        }
        for (metric, system), found in groups.items()
    ]


def _tiles(evaluation: Evaluation, baseline: str, held: Held) -> list[Tile]:
    systems = len(evaluation.systems)
    return [
        Tile("Items of the suite", str(evaluation.items), evaluation.protocol),
        Tile("Systems", str(systems), f"compared with {baseline}" if systems > 1 else ""),
        Tile(
            "Metrics", str(len(evaluation.measured)), f"{len(evaluation.unavailable)} unavailable"
        ),
        Tile(
            "Pictures in this page",
            str(held.thumbnails),
            f"{held.crops} native crops, {held.whole} whole at native pixels",
        ),
    ]


def _with_size(html: str) -> str:
    """The page with its own size in its last line."""
    # The last one: texts of others stand before it.
    head, _, tail = html.rpartition(_SIZE)
    return f"{head}{len(html.encode()) / 1e6:.1f} MB{tail}"


def build_suite_report(
    folder: Path,
    root: Path,
    options: ReportOptions,
    decision: Mapping[str, Any] | None = None,
) -> SuiteReport:
    """The whole page.

    Args:
        folder: of an evaluation.
        root: what relative paths of its pictures start from; weights are looked for below it.
        options: baseline, size, resampling.
        decision: what `gate.decide` returned; None leaves the gate out.

    Raises:
        EvaluationIncomplete: see `read_evaluation`.
        PictureChanged: a picture is gone or is not the one that was measured.
        PicturesDoNotFit: the budget is too small for thumbnails.
        ValueError: an unknown baseline.
    """
    evaluation = read_together((folder, *options.further))
    beside = [
        *judge_tables([read_judged(path) for path in options.judged]),
        *runtime_tables([read_timed(path) for path in options.timed]),
    ]
    systems = evaluation.systems
    if not systems:
        raise EvaluationIncomplete(f"{folder}: no system has pictures; see its metrics.json")
    baseline = options.baseline or systems[0]
    if baseline not in systems:
        raise ValueError(f"--baseline {baseline}: the evaluation has {', '.join(systems)}")
    metrics = [c.id for c in evaluation.image_metrics]
    cases = [
        case
        for system in systems
        if system != baseline
        for case in worst_cases(evaluation.table, baseline, system, metrics, WORST_PER_METRIC)
    ]
    sources = _item_sources(evaluation, root)
    has_reference = any(REFERENCE in item.sources for item in sources)
    viewer, embedded, held = build_viewer(
        sources,
        (*systems, REFERENCE) if has_reference else systems,
        [(case.item, (case.baseline, case.system)) for case in by_rank(cases)],
        PictureOptions(options.budget_bytes - _PAGE_RESERVE_BYTES, options.tiles, options.workers),
    )
    thumbnails = {
        (item.id, system): picture.thumbnail
        for item in viewer.items
        for system, picture in item.pictures.items()
    }
    measured = set(evaluation.measured)
    paired = _paired(evaluation, baseline, options)
    verdicts = tuple(verdict_sentence(part, baseline) for part in paired)
    figures = histograms(evaluation)
    sections = [
        ("summary", "Summary", True),
        ("metrics", "Metrics", True),
        ("statistics", "Statistics", bool(paired)),
        ("beside", "Judge and time", bool(beside)),
        ("gate", "Gate", decision is not None),
        ("worst", "Worst cases", bool(cases)),
        ("images", "Pictures", True),
        ("histograms", "Histograms", bool(figures)),
        ("cards", "Metric cards", True),
        ("lineage", "Lineage", True),
    ]
    html = (
        environment()
        .get_template("evaluation.html.j2")
        .render(
            title=f"{evaluation.suite}: {', '.join(systems)}",
            evaluation=evaluation,
            baseline=baseline,
            css=assets(STYLES),
            js=assets(SCRIPTS),
            sections=[(key, name) for key, name, shown in sections if shown],
            tiles=_tiles(evaluation, baseline, held),
            tables=metric_tables(evaluation),
            paired=paired,
            verdicts=verdicts,
            forests=[forest(part, baseline) for part in paired],
            fixed=fixed,
            column_name=column_name,
            resamples=options.resamples,
            decision=decision,
            rule_names=RULE_NAMES,
            worst=_worst_groups(cases),
            prompts={picture["item"]: picture["prompt"] for picture in evaluation.pictures},
            beside=beside,
            thumbnails=thumbnails,
            image_table=_image_table(evaluation, viewer),
            figures=figures,
            cards=[(c, status(c, measured, root / "weights")) for c in CARDS],
            viewer=viewer.as_json(),
            blocks=embedded.blocks,
        )
    )
    return SuiteReport(_with_size(html), held, verdicts)
