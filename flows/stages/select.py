"""Stage `select`: join every signal and apply the selection rules."""

from __future__ import annotations

import json

from components.corpus.manifest_copies import copy_manifest
from components.corpus.selection.join_signals import read_candidates
from components.corpus.selection.quotas import QuotaInfeasible
from components.corpus.selection.rights import EXCLUDED, Exclusions, read_exclusions
from components.corpus.selection.rules import count_by_reason, select, why_nothing_is_kept
from components.files.whole_files import write_text
from flows.stages.contract import StageContext, StageFailed, StageResult
from flows.stages.gate import check_manifest, joined


def run(context: StageContext) -> StageResult:
    """Write `data/select/manifest.parquet` and `data/select/summary.json`.

    The scored contract is checked last: contract_results.json, contract_report.html and
    contract_failed_rows.parquet say what it found.

    Raises:
        StageFailed: the list of exclusions cannot be read, nothing is kept (both files are written
            all the same), quotas that cannot hold, or a critical expectation of the scored
            contract is violated.
    """
    candidates = context.input("ingest", "manifest.parquet")
    with context.failing(ValueError):
        listed = read_exclusions(context.root / context.settings.select.exclusions)
    table = read_candidates(
        candidates,
        context.input("signals", "signals.parquet"),
        context.input("quality", "quality.parquet"),
        context.input("people", "people.parquet"),
        context.settings,
        Exclusions(listed),
    )
    with context.failing(QuotaInfeasible):
        table = select(table, context.settings.select, context.settings.project.seed)

    path = context.output_dir / "manifest.parquet"
    copy_manifest(
        candidates, table.drop(columns=["image_id", EXCLUDED], errors="ignore"), {path: None}
    )
    counts = count_by_reason(table)
    summary_path = context.output_dir / "summary.json"
    write_text(summary_path, json.dumps(counts, indent=2) + "\n")
    if counts["kept"] == 0:
        raise StageFailed(f"select: {why_nothing_is_kept(counts)}")
    result = StageResult(
        metrics={name: float(number) for name, number in counts.items()},
        artifacts=(summary_path,),
        datasets={"selection": path},
        summary=f"{counts['candidates']} candidates, {counts['kept']} kept",
    )
    checked = check_manifest(context, path, [context.settings.validation.scored], "contract_")
    return joined(result, checked)
