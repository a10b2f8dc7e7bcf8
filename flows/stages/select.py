"""Stage `select`: join every signal and apply the selection rules."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from components.corpus.manifest import read_table, write_table
from components.corpus.selection.bucket_columns import assign_buckets
from components.corpus.selection.join_signals import (
    _PEOPLE,
    _QUALITY,
    _join,
    _near_duplicates,
    _signals,
)
from components.corpus.selection.quotas import QuotaInfeasible
from components.corpus.selection.rules import REASONS, SETTING_OF, count_by_reason, select
from components.files.whole_files import write_text
from components.images.aspect_buckets import buckets
from flows.stages.contract import StageContext, StageFailed, StageResult
from flows.stages.gate import check_manifest, joined


def _nothing_kept(counts: dict[str, int]) -> str:
    """One line: what rejected everything and which setting decides it."""
    rejected = {reason: counts[f"rejected_{reason}"] for reason in REASONS}
    listed = ", ".join(f"{reason} {number}" for reason, number in rejected.items() if number)
    strictest = max(rejected, key=lambda reason: rejected[reason])
    return (
        f"select: none of {counts['candidates']} candidates passes ({listed}); "
        f"look at {SETTING_OF[strictest]} first"
    )


def run(context: StageContext) -> StageResult:
    """Write `data/select/manifest.parquet` and `data/select/summary.json`.

    The scored contract is checked last: contract_results.json, contract_report.html and
    contract_failed_rows.parquet say what it found.

    Raises:
        StageFailed: nothing is kept (both files are written all the same), quotas that cannot
            hold, or a critical expectation of the scored contract is violated.
    """
    manifest = read_table(context.input("ingest", "manifest.parquet"))
    signals = pq.read_table(context.input("signals", "signals.parquet")).to_pandas()
    quality = pq.read_table(context.input("quality", "quality.parquet")).to_pandas()
    people = pq.read_table(context.input("people", "people.parquet")).to_pandas()
    manifest = _signals(manifest, signals)
    manifest = _join(manifest, quality, _QUALITY)
    manifest = _join(manifest, people, _PEOPLE)
    # `qalign` is filled only by the model of that name.
    is_qalign = manifest["quality_scorer"].str.lower().str.startswith(("qalign", "q-align"))
    manifest["qalign"] = manifest["quality_score"].where(is_qalign.eq(True))
    manifest = _near_duplicates(manifest, context.settings.select)
    manifest = assign_buckets(manifest, buckets(context.settings.buckets))
    try:
        manifest = select(manifest, context.settings.select, context.settings.project.seed)
    except QuotaInfeasible as problem:
        raise StageFailed(f"select: {problem}") from None

    path = context.output_dir / "manifest.parquet"
    write_table(manifest, path)
    counts = count_by_reason(manifest)
    summary_path = context.output_dir / "summary.json"
    write_text(summary_path, json.dumps(counts, indent=2) + "\n")
    if counts["kept"] == 0:
        raise StageFailed(_nothing_kept(counts))
    result = StageResult(
        metrics={name: float(number) for name, number in counts.items()},
        artifacts=(summary_path,),
        datasets={"selection": path},
        summary=f"{counts['candidates']} candidates, {counts['kept']} kept",
    )
    checked = check_manifest(context, path, [context.settings.validation.scored], "contract_")
    return joined(result, checked)
