"""Stage `dit_stage1`: SACL stage 1, all training images at all noise levels."""

from __future__ import annotations

from flows.stages.contract import StageContext, StageResult
from flows.stages.dit import run_dit


def run(context: StageContext) -> StageResult:
    """Train on `data/slices/stage1.parquet`; see `flows.stages.dit.run_dit`."""
    return run_dit(context, "stage1.parquet")
