"""Data contracts at the end of a stage: the pipeline goes on, or stops there with one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.corpus.manifest_columns import read_columns
from components.telemetry.wording import legible
from flows.stages.contract import StageContext, StageFailed, StageResult
from flows.validation import (
    ContractError,
    Outcome,
    ValidationReport,
    columns_read,
    load_contract,
    presence_read,
    validate,
    write_report,
)

_NAMED_IN_MESSAGES = 3


def check_manifest(
    context: StageContext, manifest: Path, contracts: Sequence[str], prefix: str = ""
) -> StageResult:
    """Check a manifest; results, page and violating rows are written to the stage's folder.

    Args:
        context: the stage that checks.
        manifest: written Parquet file; only the columns that the contracts name are read.
        contracts: YAML files below the repository root, all of which must hold.
        prefix: start of the three file names and of the metrics' names.

    Returns:
        Counts, the three files, and a line for the summary.

    Raises:
        StageFailed: a critical expectation is violated (after the files were written; they go with
            the error), or a contract cannot be used.
    """
    with context.failing(ContractError):
        loaded = [load_contract(context.root / name) for name in contracts]
        # As it was written, not as it was in memory: the next stages read the file.
        table = read_columns(manifest, columns_read(loaded), presence=presence_read(loaded))
        report = validate(table, loaded, context.settings)
    results, page, rows = write_report(report, context.output_dir, prefix)
    result = StageResult(
        metrics={f"{prefix}{name}": value for name, value in _metrics(report).items()},
        artifacts=(results, page, rows),
        summary=_summary(report),
    )
    if report.failures("critical"):
        shown = page.relative_to(context.root), rows.relative_to(context.root)
        raise StageFailed(_stop(context.stage, report, *shown), result)
    return result


def joined(result: StageResult, checked: StageResult) -> StageResult:
    """A stage's result with what its contract check found."""
    return StageResult(
        metrics={**result.metrics, **checked.metrics},
        artifacts=(*result.artifacts, *checked.artifacts),
        datasets=result.datasets,
        tags=result.tags,
        promotions=result.promotions,
        summary=f"{result.summary}; {checked.summary}",
    )


def _metrics(report: ValidationReport) -> dict[str, float]:
    statuses = [outcome.status for outcome in report.outcomes]
    return {
        "expectations": float(len(statuses)),
        "passed": float(statuses.count("passed")),
        "skipped": float(statuses.count("skipped")),
        "critical_failures": float(len(report.failures("critical"))),
        "warning_failures": float(len(report.failures("warning"))),
    }


def _summary(report: ValidationReport) -> str:
    counts = _metrics(report)
    warnings = report.failures("warning")
    warned = f"; warning: {'; '.join(map(_describe, warnings))}" if warnings else ""
    return (
        f"{counts['passed']:.0f} of {counts['expectations']:.0f} expectations hold, "
        f"{counts['skipped']:.0f} skipped{warned}"
    )


def _describe(outcome: Outcome) -> str:
    """Expectation, column and the offending rows of one violation."""
    where = f"{outcome.expectation} on {outcome.column or 'the table'}"
    if not outcome.unexpected:
        return f"{where}: {outcome.observed or 'violated'}"
    named = ", ".join(
        legible(
            f"{row['uri']} ({row['image_id'][:12] if row['image_id'] else 'no image_id'}) "
            f"= {row['value']}"
        )
        for row in outcome.examples[:_NAMED_IN_MESSAGES]
    )
    more = outcome.unexpected - _NAMED_IN_MESSAGES
    return f"{where}: {named}" + (f" and {more} more" if more > 0 else "")


def _stop(stage: str, report: ValidationReport, page: Path, rows: Path) -> str:
    failures = report.failures("critical")
    described = "; ".join(_describe(outcome) for outcome in failures)
    return (
        f"{stage}: {len(failures)} critical expectations of contract {report.contract} violated: "
        f"{described}; see {page} and {rows.name}"
    )
