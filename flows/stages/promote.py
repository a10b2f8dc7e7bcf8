"""Stage `promote`: the gate decides; the uploader applies the decision to the registry."""

from __future__ import annotations

from dataclasses import asdict

from components.evaluation.promotion_decision import (
    decide_promotion,
    decision_numbers,
    write_decision,
)
from components.evaluation.statistics.non_inferiority import BaselineUnusable
from flows.stages.contract import StageContext, StageResult
from flows.tracking.promotion import explain, promotions


def run(context: StageContext) -> StageResult:
    """Judge the trained models; write `data/promote/{decision.json, metrics.json}`.

    Raises:
        StageFailed: a stage before this one has not run, or the baseline is not the one that the
            settings name.
    """
    settings = context.settings
    # The decision reads more than one stage's outputs; each is named before anything is judged.
    context.input("evaluate", "metrics.json")
    context.input("evaluate", "scores.parquet")
    context.input("vae", "autoencoder")
    context.input("dit_stage2", settings.generate.weights)
    with context.failing(BaselineUnusable):
        decision = decide_promotion(context.root, settings, print)
    wanted = promotions(context.root, decision, settings.project.name)
    return StageResult(
        metrics=decision_numbers(decision),
        artifacts=(write_decision(decision, context.output_dir),),
        promotions=tuple(asdict(promotion) for promotion in wanted),
        summary=explain(decision),
    )
