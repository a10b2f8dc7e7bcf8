"""Stage `promote`: the gate decides; the uploader applies the decision to the registry."""

from __future__ import annotations

import json
from dataclasses import asdict

import pandas as pd

from components.evaluation.statistics.gate import decide
from components.files.weight_folders import folder_digest
from components.files.whole_files import write_text
from flows.stages.baseline import baseline_scores
from flows.stages.contract import StageContext, StageResult
from flows.tracking.promotion import explain, promotions


def run(context: StageContext) -> StageResult:
    """Judge the trained models; write `data/promote/{decision.json, metrics.json}`."""
    metrics = json.loads(context.input("evaluate", "metrics.json").read_text(encoding="utf-8"))
    paths = {
        "autoencoder": context.input("vae", "autoencoder"),
        "transformer": context.input("dit_stage2", context.settings.generate.weights),
    }
    digests = {kind: folder_digest(path) for kind, path in paths.items()}
    relative = {kind: str(path.relative_to(context.root)) for kind, path in paths.items()}
    decision = decide(
        metrics,
        context.settings.promote,
        digests,
        candidate=pd.read_parquet(context.input("evaluate", "scores.parquet")),
        baseline=baseline_scores(context),
        seed=context.settings.project.seed,
    ) | {"paths": relative}
    output = context.output_dir / "decision.json"
    write_text(output, json.dumps(decision, indent=1) + "\n")
    numbers = {"promoted": float(decision["promoted"])} | {
        f"margin.{rule['name']}": rule["margin"]
        for rule in decision["rules"]
        if rule["margin"] is not None
    }
    measured = context.output_dir / "metrics.json"
    write_text(measured, json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    return StageResult(
        metrics=numbers,
        artifacts=(output,),
        promotions=tuple(
            asdict(promotion)
            for promotion in promotions(context.root, decision, context.settings.project.name)
        ),
        summary=explain(decision),
    )
