"""Stage `dit_stage2`: SACL stage 2, the most aesthetic images at high noise levels."""

from __future__ import annotations

from flows.stages.contract import StageContext, StageResult
from flows.stages.dit import run_dit


def run(context: StageContext) -> StageResult:
    """Train on `data/slices/stage2.parquet`, from stage 1's weights; see `run_dit`."""
    start = context.settings.dit_stage2.initial_weights
    before = (
        None
        if start == "pretrained"
        else context.input("dit_stage1", start.removeprefix("stage1_"))
    )
    return run_dit(context, "stage2.parquet", before)
