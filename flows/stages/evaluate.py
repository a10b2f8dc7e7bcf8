"""Stage `evaluate`: reconstruction fidelity, weight-free image metrics, and the report page."""

from __future__ import annotations

from components.evaluation.pipeline_evaluation import evaluate_pipeline
from components.evaluation.statistics.non_inferiority import BaselineUnusable
from components.images.original_lookup import OriginalsMissing
from flows.stages.contract import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `data/evaluate/{scores.parquet, metrics.json, report.html}`.

    Raises:
        StageFailed: a stage before this one has not run, photographs are missing, or the baseline
            is not the one that the settings name.
    """
    # Asked for here, where a missing one names the stage to run; the library would only say "no
    # file".
    context.input("slices", "eval.parquet")
    context.input("vae", "autoencoder")
    context.input("generate", "generations.jsonl")
    context.input("generate", "images")
    context.input("dit_stage1", "metrics.json")
    context.input("dit_stage2", "metrics.json")
    with context.failing(OriginalsMissing, BaselineUnusable):
        found = evaluate_pipeline(context.root, context.settings)
    written = found.write(context.output_dir)
    verdict = "gate passed" if found.decision["promoted"] else "gate not passed"
    gain = found.metrics.get("vae_psnr_gain_db")
    return StageResult(
        metrics=found.metrics,
        artifacts=(written["report.html"], written["metrics.json"]),
        datasets={"scores": written["scores.parquet"]},
        tags={f"sha256.{name}": digest for name, digest in found.digests.items()},
        summary=f"{len(found.table)} scores, "
        + ("" if gain is None else f"autoencoder {gain:+.2f} dB, ")
        + verdict,
    )
