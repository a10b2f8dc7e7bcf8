"""The pipeline's evaluation of itself: scores, headline numbers, the gate's verdict and the page.

evaluation = evaluate_pipeline(root, load_settings(root / "params.yaml"))
evaluation.write(root / "data" / "evaluate")
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from components.evaluation.measuring.pipeline_scores import GENERATIONS, pipeline_scores
from components.evaluation.measuring.twin_scores import pipeline_twins, twin_metrics
from components.evaluation.pages.report import build_report
from components.evaluation.statistics import gate, scores
from components.evaluation.statistics.non_inferiority import baseline_scores
from components.files.whole_files import whole_file, write_text
from components.generation.generation_list import read_generations
from components.settings.schema import Settings

LOSSES = (
    Path("data", "dit_stage1", "metrics.json"),
    Path("data", "dit_stage2", "metrics.json"),
)
"""Where the first and the last validation loss stand."""


@dataclass(frozen=True)
class PipelineEvaluation:
    """What was found; nothing of it is on disk before `write`."""

    table: pd.DataFrame
    """One row per image and metric."""
    metrics: dict[str, float]
    """Headline numbers, sorted by name."""
    decision: dict[str, Any]
    """What the gate would say of these numbers."""
    digests: dict[str, str]
    """Model name to content digest, as written into every generated image."""
    page: str
    """HTML."""

    def write(self, folder: Path) -> dict[str, Path]:
        """Write `scores.parquet`, `metrics.json` and `report.html`, each whole or not at all.

        Args:
            folder: exists.

        Returns:
            Path by file name.
        """
        names = ("scores.parquet", "metrics.json", "report.html")
        table, metrics, page = (folder / name for name in names)
        with whole_file(table) as temporary:
            self.table.to_parquet(temporary, index=False)
        write_text(metrics, json.dumps(self.metrics, indent=2, sort_keys=True) + "\n")
        write_text(page, self.page)
        return dict(zip(names, (table, metrics, page), strict=True))


def evaluate_pipeline(root: Path, settings: Settings) -> PipelineEvaluation:
    """Measure what the stages before `evaluate` left below `data/`.

    Args:
        root: repository root.
        settings: all settings.

    Raises:
        FileNotFoundError: a stage before this one has not run.
        OriginalsMissing: held-out photographs exist nowhere.
        BaselineUnusable: `promote.baseline` names a file that is missing or another one.
    """
    # Part of the result: another number of threads sums in another order, which moves last digits.
    torch.set_num_threads(settings.runtime.torch_threads)
    table = pipeline_scores(root, settings)
    headline = scores.headline_metrics(
        table,
        resamples=settings.evaluate.bootstrap_resamples,
        seed=settings.project.seed,
    )
    twins = pipeline_twins(root, settings)
    metrics = dict(sorted((headline | validation_loss(root) | twin_metrics(twins)).items()))
    # All images of a run are made by the same weights.
    digests: dict[str, str] = read_generations(root / GENERATIONS)[0]["digests"]
    decision = gate.decide(
        metrics,
        settings.promote,
        digests,
        candidate=table,
        baseline=baseline_scores(root, settings.promote.baseline),
        seed=settings.project.seed,
    )
    page = build_report(
        root, settings, table=table, metrics=metrics, decision=decision, twins=twins
    )
    return PipelineEvaluation(table, metrics, decision, digests, page)


def validation_loss(root: Path) -> dict[str, float]:
    """First value before stage 1 (if its log has kept it), last after stage 2, relative fall.

    Where stage 1 measured training images like held-out ones, its numbers stand beside.
    """
    before, after = (json.loads((root / path).read_text(encoding="utf-8")) for path in LOSSES)
    first, last = before.get("validation_loss_first"), float(after["validation_loss_last"])
    # Of stage 1 alone: stage 2 trains on other images.
    by_heart = {k: v for k, v in before.items() if k.startswith("training_images_loss_")}
    numbers = {**by_heart, "validation_loss_last": last}
    # Without it there is no fall, and a gate that asks for one refuses.
    if first is not None:
        numbers |= {"validation_loss_first": first, "validation_loss_drop": 1.0 - last / first}
    return numbers
