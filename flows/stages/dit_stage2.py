"""Stage `dit_stage2`: SACL stage 2, the most aesthetic images at high noise levels."""

from __future__ import annotations

from flows.stages.contract import StageContext, StageResult
from flows.stages.dit import run_dit


def run(context: StageContext) -> StageResult:
    """Train on `data/slices/stage2.parquet`, from stage 1's weights; see `run_dit`."""
    return run_dit(context, context.settings.dit_stage2, context.input("slices", "stage2.parquet"))
