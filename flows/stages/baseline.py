"""The champion's scores, as far as there are any."""

from __future__ import annotations

import pandas as pd

from components.evaluation.statistics.non_inferiority import read_baseline
from flows.stages.contract import StageContext, StageFailed


def baseline_scores(context: StageContext) -> pd.DataFrame | None:
    """Scores table of `promote.baseline`; None where the settings name none.

    Raises:
        StageFailed: the file is missing or another one than named.
    """
    settings = context.settings.promote.baseline
    if settings is None:
        return None
    try:
        return read_baseline(context.root, settings)
    except ValueError as problem:
        raise StageFailed(f"{context.stage}: {problem}") from None
