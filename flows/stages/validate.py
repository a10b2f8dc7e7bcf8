"""Stage `validate`: the captioned manifest must keep its contract before anything is trained."""

from __future__ import annotations

from components.corpus.manifest import read_table
from flows.stages.contract import StageContext, StageFailed, StageResult
from flows.validation import (
    ContractError,
    Outcome,
    ValidationReport,
    load_contract,
    validate,
    write_report,
)

_NAMED_IN_MESSAGES = 3


def _describe(outcome: Outcome) -> str:
    """Expectation, column and the offending rows of one violation."""
    where = f"{outcome.expectation} on {outcome.column or 'the table'}"
    if not outcome.unexpected:
        return f"{where}: {outcome.observed or 'violated'}"
    named = ", ".join(
        f"{row['uri']} ({row['image_id'][:12] if row['image_id'] else 'no image_id'}) "
        f"= {row['value']}"
        for row in outcome.examples[:_NAMED_IN_MESSAGES]
    )
    more = outcome.unexpected - _NAMED_IN_MESSAGES
    return f"{where}: {named}" + (f" and {more} more" if more > 0 else "")


def _stop(report: ValidationReport) -> str:
    failures = report.failures("critical")
    described = "; ".join(_describe(outcome) for outcome in failures)
    return (
        f"validate: {len(failures)} critical expectations of contract {report.contract} violated: "
        f"{described}; see data/validate/report.html and failed_rows.parquet"
    )


def run(context: StageContext) -> StageResult:
    """Write results.json, report.html and failed_rows.parquet under `data/validate/`.

    Raises:
        StageFailed: a critical expectation is violated (after the files were written), or the
            contract cannot be used.
    """
    manifest = read_table(context.input("caption", "manifest.parquet"))
    try:
        contract = load_contract(context.root / context.settings.validation.contract)
        report = validate(manifest, contract, context.settings)
    except ContractError as problem:
        raise StageFailed(f"validate: {problem}") from None
    results, page, rows = write_report(report, context.output_dir)
    if report.failures("critical"):
        raise StageFailed(_stop(report))
    warnings = report.failures("warning")
    passed = sum(outcome.status == "passed" for outcome in report.outcomes)
    skipped = sum(outcome.status == "skipped" for outcome in report.outcomes)
    warned = f"; warning: {'; '.join(map(_describe, warnings))}" if warnings else ""
    return StageResult(
        metrics={
            "expectations": float(len(report.outcomes)),
            "passed": float(passed),
            "skipped": float(skipped),
            "critical_failures": 0.0,
            "warning_failures": float(len(warnings)),
        },
        artifacts=(results, page, rows),
        summary=f"{passed} of {len(report.outcomes)} expectations hold, {skipped} skipped{warned}",
    )
