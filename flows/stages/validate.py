"""Stage `validate`: the captioned manifest must keep its contracts before anything is trained."""

from __future__ import annotations

from flows.stages.contract import StageContext, StageResult
from flows.stages.gate import check_manifest


def run(context: StageContext) -> StageResult:
    """Write results.json, report.html and failed_rows.parquet under `data/validate/`.

    The raw and the scored contract are checked again: captions and attribution were joined since.

    Raises:
        StageFailed: a critical expectation is violated (after the files were written), or a
            contract cannot be used.
    """
    named = context.settings.validation
    contracts = (named.raw, named.scored, named.released)
    return check_manifest(context, context.input("caption", "manifest.parquet"), contracts)
