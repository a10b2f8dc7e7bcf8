"""A suite's results: pictures of every system measured, a row per number, and headline metrics.

`scores.parquet` continues the pipeline's table of scores (see `scores.COLUMNS`) with what
statistics and reports need: the item (pictures of one item are paired), the stratum, the digest of
the picture, and why there is no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from components.evaluation.measuring.compared_sets import compare_measured_sets
from components.evaluation.measuring.evaluation_run import (
    EvaluationRun,
    Found,
    Measured,
    OpenedMetrics,
    RunOptions,
    RunStatistics,
    find_picture,
)
from components.evaluation.measuring.ledger import Ledger
from components.evaluation.statistics import scores
from components.evaluation.statistics.comparison import Refusal
from components.evaluation.statistics.set_comparison import SetComparison
from components.evaluation.suites.picture_checks import (
    measured_sizes,
    missing_values,
    other_size,
    reading_notes,
)
from components.evaluation.suites.set_scores import (
    NO_SET_INTERVAL,
    ReferenceFiles,
    groups,
    set_movers,
    set_numbers,
)
from components.evaluation.suites.suites import Suite, SuiteItem
from components.evaluation.suites.system import References, System, SystemFailed, remarks
from components.files.weight_folders import WeightsMissing
from components.metrics.cards import card
from components.metrics.metric import Picture, SetMetric

if TYPE_CHECKING:
    from components.evaluation.statistics.sequential import Look

COLUMNS = (*scores.COLUMNS, "item", "stratum", "image_sha256", "error")


@dataclass
class SuiteResult:
    """What `evaluate_suite` found."""

    table: pd.DataFrame
    """Columns `COLUMNS`; a row per system, item and metric of one picture."""
    metrics: dict[str, float]
    """`<system>.<metric>`, with `_low`, `_high` and `_n`, and the same per stratum."""
    unavailable: dict[str, str]
    """Metrics that could not be measured, and why."""
    failed_systems: dict[str, str]
    statistics: RunStatistics
    pictures: list[dict[str, str]] = field(default_factory=list)
    """For reports on this machine: system, item, path, sha256, prompt, reference."""
    set_comparisons: list[SetComparison] = field(default_factory=list)
    """Set metrics of each system against the baseline."""
    set_refusals: dict[str, list[Refusal]] = field(default_factory=dict)
    """By system: set metrics that could not be compared with the baseline."""
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """By system: pictures of each measured size, "width x height"."""
    other_sizes: dict[str, str] = field(default_factory=dict)
    """Systems whose pictures have another size than the suite asks for, and which; their numbers
    stand under a title of their own."""
    looks: dict[str, Look] = field(default_factory=dict)
    """By system: the last look of a run that stops when a metric decides."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to know of how pictures were matched, read and taken over."""

    @property
    def unmeasured(self) -> dict[str, str]:
        """Systems with pictures that could not be measured, or without any value: how many."""
        said = {}
        for system, rows in self.table.groupby("system"):
            failed = rows.loc[rows["error"].notna(), "item"].nunique()
            if failed:
                total = rows["item"].nunique()
                said[str(system)] = f"{failed} of {total} pictures could not be measured"
            elif rows["value"].isna().all():
                said[str(system)] = "no metric has a value for any picture"
        return said


def clashing_name(names: Sequence[str], strata: set[str]) -> str:
    """What is wrong with a system's name that stands for another's part in `headline`; or ""."""
    for name in names:
        system, _, stratum = name.rpartition(".")
        if system in names and stratum in strata and len(strata) > 1:
            return f"{name}: this is what the numbers of {system} for {stratum} are called"
    return ""


def fitted_references(items: Sequence[SuiteItem], folder: Path) -> list[SuiteItem]:
    """Items whose references have the items' sizes: resized to cover, centre kept, as PNG.

    A reference that has the size already is used as it is.
    """
    from PIL import Image

    from components.evaluation.suites.system import is_finished
    from components.generation.image_metadata import save_with_metadata
    from components.images.aspect_buckets import Bucket, fit_to_bucket
    from components.images.decoding import read_rgb

    fitted = []
    for item in items:
        assert item.reference is not None
        found = find_picture(item.reference)
        if (found.height, found.width) != (item.height, item.width) and found.error is None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{item.id}.png"
            key = f"{found.content}/{item.height}x{item.width}"
            if not is_finished(path, key):
                image = Image.fromarray(read_rgb(item.reference).pixels)
                fitted_image = fit_to_bucket(image, Bucket(item.height, item.width))
                save_with_metadata(fitted_image, path, {"ultraflux_key": key})
            item = replace(item, reference=path)
        fitted.append(item)
    return fitted


def evaluate_suite(
    suite: Suite,
    systems: Sequence[System],
    opened: OpenedMetrics,
    metric_ids: Sequence[str],
    *,
    ledger: Ledger,
    options: RunOptions,
    out_dir: Path,
    baseline: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    any_size: bool = False,
    asked_as: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SuiteResult:
    """Make or find the pictures of every system and measure them.

    Args:
        suite: what is asked for.
        systems: with distinct names.
        opened: from `open_metrics`.
        metric_ids: what is reported; an opened metric may yield more.
        ledger: of measurements; compacted at the end.
        options: of the measuring.
        out_dir: pictures that systems make go below it.
        baseline: system that set metrics of the others are tested against; None: no test.
        resamples: of the bootstrap intervals, and exchanges of the tests.
        seed: of both.
        any_size: pictures of another size than the suite asks for are measured, under a title of
            their own; else such a system fails. The suite's own pictures always are.
        asked_as: other texts that systems get for prompts of the suite, such as refined ones;
            metrics read the suite's.
        say: gets a line for a person now and then.

    Raises:
        ValueError: two systems with one name or under one another's numbers (`clashing_name`), or
            a baseline that is none of them.
        LedgerConflict: see `Ledger`.
    """
    if len({system.name for system in systems}) != len(systems):
        raise ValueError("--system: every system needs a name of its own")
    names = [system.name for system in systems]
    if clash := clashing_name(names, {item.stratum for item in suite.items}):
        raise ValueError(f"--system {clash}; choose another name")
    if baseline is not None and baseline not in names:
        raise ValueError(f"--baseline {baseline}: the systems are {', '.join(names)}")
    run = EvaluationRun(opened, ledger, options)
    items: Sequence[SuiteItem] = suite.items
    if suite.is_reconstruction:
        items = fitted_references(items, out_dir / "references")
    references = ReferenceFiles()
    reported = [metric_id for metric_id in metric_ids if metric_id in opened.ids]
    unavailable = dict(opened.unavailable)
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    failed: dict[str, str] = {}
    listed: list[dict[str, str]] = []
    by_system: dict[str, dict[str, Picture]] = {}
    sizes: dict[str, dict[str, int]] = {}
    others: dict[str, str] = {}
    notes: list[str] = []
    texts = asked_as or {}
    asked = [replace(item, prompt=texts.get(item.prompt, item.prompt)) for item in items]
    if texts:
        notes.append(
            f"systems were given refined texts for {len(texts)} prompts; metrics read the suite's"
        )
    for system in systems:
        try:
            paths = system.pictures(asked, out_dir / "images" / system.name)
            found = [find_picture(path, options.max_megapixels) for path in paths]
            other = other_size(items, found)
            if other and not any_size and not isinstance(system, References):
                raise SystemFailed(
                    f"{system.name}: {other}; give pictures of the suite's size, or measure these "
                    "under a title of their own with --any-size"
                )
        except (SystemFailed, WeightsMissing, ValueError) as problem:
            failed[system.name] = str(problem)
            say(f"{system.name}: {problem}")
            continue
        notes += [f"{system.name}: {note}" for note in (*remarks(system), *reading_notes(found))]
        if other:
            others[system.name] = other
        good = [place for place, file in enumerate(found) if file.error is None]
        pictures = [references.picture(items[place], found[place]) for place in good]
        theirs = references.needed(opened, items)
        measured = run.measure(pictures, sets_only=theirs, name=f"measure {system.name}")
        by_place = dict(zip(good, measured, strict=True))
        # One that cannot be decoded is known by its header alone.
        whole = (place for place in good if by_place[place].values or not by_place[place].errors)
        sizes[system.name] = measured_sizes([found[place] for place in whole])
        ours: list[dict[str, Any]] = []
        for place, item in enumerate(items):
            ours += _rows(system.name, item, found[place], by_place.get(place), reported)
            listed.append(
                {
                    "system": system.name,
                    "item": item.id,
                    "path": str(paths[place]),
                    "sha256": found[place].sha256,
                    "prompt": item.prompt,
                    "reference": str(item.reference or ""),
                }
            )
        rows += ours
        notes += [f"{system.name}: {line}" for line in missing_values(ours)]
        by_system[system.name] = {
            items[place].id: picture for place, picture in zip(good, pictures, strict=True)
        }
        if _has_sets(opened):
            numbers, reasons = set_numbers(
                run, opened, system.name, by_system[system.name], items, references
            )
            metrics |= numbers
            unavailable |= {name: reason for name, reason in reasons.items() if name in reported}
            moved = set_movers(opened, ledger, by_system[system.name], references, items)
            notes += [f"{system.name}: {line}" for line in moved]
    if any(card(metric_id).needs in {"pair", "set pair"} for metric_id in opened.ids):
        notes += [f"references: {note}" for note in reading_notes(references.found)]
    if by_system and _has_sets(opened):
        notes.append(NO_SET_INTERVAL)
    ledger.compact()
    table = _table(rows)
    metrics |= headline(table, resamples=resamples, seed=seed)
    result = SuiteResult(
        table,
        dict(sorted(metrics.items())),
        unavailable,
        failed,
        run.statistics,
        listed,
        sizes=sizes,
        other_sizes=others,
        notes=notes,
    )
    if baseline in by_system and _has_sets(opened):
        for name in (name for name in by_system if name != baseline):
            if sizes[name] != sizes[baseline]:
                reason = f"{name} and {baseline} have other sizes or numbers of pictures"
                result.set_refusals[name] = [Refusal("sets", reason)]
                continue
            for stratum, chosen in groups(items).items():
                ids = {item.id for item in chosen}
                one, other_one = (
                    {item: picture for item, picture in by_system[side].items() if item in ids}
                    for side in (baseline, name)
                )
                compared, refused = compare_measured_sets(
                    opened,
                    ledger,
                    (baseline, one),
                    (name, other_one),
                    references.as_they_are(chosen),
                    permutations=resamples,
                    seed=seed,
                    fitted=references.fitted(chosen),
                    stratum=stratum,
                )
                result.set_comparisons += [one for one in compared if one.metric in reported]
                result.set_refusals.setdefault(name, []).extend(
                    replace(one, reason=f"{stratum}: {one.reason}" if stratum else one.reason)
                    for one in refused
                    if one.metric in reported
                )
    return result


def _has_sets(opened: OpenedMetrics) -> bool:
    return any(isinstance(metric, SetMetric) for metric in opened.metrics)


def _rows(
    system: str,
    item: SuiteItem,
    found: Found,
    measured: Measured | None,
    reported: Iterable[str],
) -> list[dict[str, Any]]:
    rows = []
    for metric_id in reported:
        if card(metric_id).needs == "set pair":
            continue
        value, error = None, found.error
        if measured is not None:
            value = measured.values.get(metric_id)
            error = measured.errors.get(metric_id)
        rows.append(
            {
                "image": found.path.name,
                "system": system,
                "height": found.height,
                "width": found.width,
                "metric": metric_id,
                "protocol": card(metric_id).protocol,
                "value": value,
                "prompt": item.prompt,
                "item": item.id,
                "stratum": item.stratum,
                "image_sha256": found.sha256,
                "error": error,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["value"] = table["value"].astype("float64")
    for name in ("prompt", "error"):
        table[name] = scores.text_column(table[name])
    return table.sort_values(["system", "item", "metric"], kind="stable", ignore_index=True)


def headline(table: pd.DataFrame, *, resamples: int, seed: int) -> dict[str, float]:
    """Means with 95% intervals (from two prompts on) by system, and by stratum if several."""
    out: dict[str, float] = {}
    strata = sorted(set(table["stratum"]))
    for system in sorted(set(table["system"])):
        ours = table[table["system"] == system]
        groups = {system: ours}
        if len(strata) > 1:
            groups |= {f"{system}.{s}": ours[ours["stratum"] == s] for s in strata}
        for prefix, rows in groups.items():
            for metric in sorted(set(rows["metric"])):
                out |= _summary(f"{prefix}.{metric}", rows, metric, resamples, seed)
    return out


def _summary(
    name: str, rows: pd.DataFrame, metric: str, resamples: int, seed: int
) -> dict[str, float]:
    ours = rows[rows["metric"] == metric]
    measured = ours[np.isfinite(ours["value"])]
    infinite = int(np.isposinf(ours["value"]).sum())
    # Counted, never dropped: a PSNR of equal pictures is the best there is, and a mean over the
    # others alone would punish the system that has most of them.
    counts = {f"{name}_infinite": float(infinite)} if infinite else {}
    value = scores.set_value(measured, metric)
    if value is None or not math.isfinite(value):
        return {f"{name}_n": 0.0, **counts}
    out = {name: value, f"{name}_n": float(len(measured)), **counts}
    estimate = scores.set_estimate(measured, metric, resamples=resamples, seed=seed, picture="item")
    if estimate is not None:
        out |= {
            f"{name}_low": estimate.low,
            f"{name}_high": estimate.high,
            f"{name}_prompts": float(estimate.clusters or 0),
        }
    return out


def count_note(metrics: Mapping[str, float], name: str) -> str:
    """Such as "4 of 7 identical" where a metric is infinite for some pictures; else empty."""
    infinite = int(metrics.get(f"{name}_infinite", 0))
    finite = int(metrics.get(f"{name}_n", 0))
    return infinite_note(name.rpartition(".")[2], infinite, finite) if infinite else ""


def infinite_note(metric: str, infinite: int, finite: int) -> str:
    """Such as "4 of 7 identical": what an infinite value says, by the metric's direction."""
    # Of NMSE it is the worst there is: any error over a black reference.
    what = "identical" if card(metric).direction == "higher" else "infinite"
    return f"{infinite} of {infinite + finite} {what}"


def statistics_of(result: SuiteResult) -> dict[str, int]:
    """What the run did, for people and tests."""
    return asdict(result.statistics)
