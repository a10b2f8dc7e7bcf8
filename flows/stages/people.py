"""Stage `people`: evidence of people, NSFW scores, the `character` tag and the channel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from components.corpus.derivatives import derivative_ids, score_derivatives
from components.corpus.manifest import read_table, to_arrow
from components.corpus.people import evidence as people
from components.corpus.people import nsfw, person_detectors
from components.engine.map_items import EngineLimits, ItemsFailed
from components.files.parquet_files import write_parquet
from components.files.weight_folders import WeightsMissing, folder_digest, resolve_folder
from flows.stages.contract import StageContext, StageFailed, StageResult

# Loading a network counts against the first item's time, and CUDA reserves address space freely.
_NETWORK_TIMEOUT_S = 600.0
_NETWORK_MEMORY_MB = 2**24


def _digest(path: Path) -> str:
    return nsfw.file_sha256(path) if path.is_file() else folder_digest(path)


def _plan(context: StageContext) -> people.LookPlan:
    """Weights are found and identified once, before any worker starts.

    Raises:
        WeightsMissing: they are not there.
    """
    settings = context.settings.people
    plan = people.LookPlan(
        detector="none" if settings.detector == "table" else settings.detector,
        nsfw=settings.nsfw.scorer,
        min_score=settings.min_score,
        device=context.settings.runtime.device,
    )
    if plan.detector in ("owlv2", "rtdetr", "yoloe"):
        folder = context.root / settings.weights if settings.weights is not None else None
        weights = person_detectors.check_weights(plan.detector, folder)
        plan = replace(plan, weights=weights, weights_digest=_digest(weights))
    elif plan.detector == "nudenet":
        plan = replace(plan, weights_digest=nsfw.file_sha256(nsfw.nudenet_weights()))
    if plan.nsfw == "nudenet":
        plan = replace(plan, nsfw_digest=nsfw.file_sha256(nsfw.nudenet_weights()))
    elif plan.nsfw == "classifier" and settings.nsfw.weights is not None:
        folder = resolve_folder(
            context.root / settings.nsfw.weights,
            "NSFW classifier (people.nsfw.weights)",
            nsfw.CLASSIFIER_COMMAND,
        )
        plan = replace(plan, nsfw_weights=folder, nsfw_digest=_digest(folder))
    return plan


def _limits(context: StageContext, plan: people.LookPlan) -> EngineLimits:
    """Networks of torch get time to load, memory, and on a GPU one process."""
    if not plan.runs_networks:
        return EngineLimits.of(context.settings)
    return EngineLimits.for_networks(
        context.settings, timeout_s=_NETWORK_TIMEOUT_S, memory_mb=_NETWORK_MEMORY_MB
    )


def _look(context: StageContext, plan: people.LookPlan, derivatives: Path) -> pd.DataFrame:
    path = context.state_dir / "looked_at.parquet"
    score_derivatives(
        partial(people.look_at, plan=plan),
        people,
        people.PEOPLE_SCHEMA,
        derivatives=derivatives,
        derivative_px=context.settings.signals.derivative_px,
        destination=path,
        state_dir=context.state_dir / "shards",
        limits=_limits(context, plan),
        key=plan.key(),
        modules=(nsfw, person_detectors),
        outside=(WeightsMissing,),
    )
    return pq.read_table(path).to_pandas()


def _found(context: StageContext, derivatives: Path) -> pd.DataFrame:
    """One row per derivative, from the table of boxes and what is looked for here.

    Raises:
        ValueError: external boxes that are missing or incomplete.
        WeightsMissing: weights that the settings name are not there.
    """
    settings = context.settings.people
    plan = _plan(context)
    if settings.detector != "table" or settings.boxes is None:
        return _look(context, plan, derivatives)
    ids = derivative_ids(derivatives)
    table = people.people_from_table(context.root / settings.boxes, ids, settings.min_score)
    if plan.nsfw == "none":
        return table
    looked = _look(context, plan, derivatives)
    return table.merge(looked.drop(columns=table.columns[1:]), on="image_id", validate="1:1")


def run(context: StageContext) -> StageResult:
    """Write `data/people/people.parquet`, one row per image that could be decoded.

    Raises:
        StageFailed: weights, or external boxes, that are missing or incomplete.
    """
    derivatives = context.input("signals", "derivatives.parquet")
    manifest = read_table(context.input("ingest", "manifest.parquet"))
    settings = context.settings.people
    try:
        found = _found(context, derivatives)
    except (ValueError, WeightsMissing, ItemsFailed) as problem:
        raise StageFailed(f"people: {problem}") from None
    result = people.with_channel(
        found, manifest, queries=settings.human_queries, sources=settings.human_sources
    )
    path = context.output_dir / "people.parquet"
    write_parquet(to_arrow(result, people.PEOPLE_SCHEMA), path)
    result = pq.read_table(path).to_pandas()

    characters = int(result["is_character"].eq(True).sum())
    human = int(result["channel"].eq("human").sum())
    scorers = ", ".join(sorted(result["person_scorer"].dropna().unique()))
    nsfw_scorers = ", ".join(sorted(result["nsfw_scorer"].dropna().unique()))
    return StageResult(
        metrics={
            "looked_at": float(len(result)),
            "characters": float(characters),
            "human_channel": float(human),
            "nsfw_scored": float(result["nsfw_score"].notna().sum()),
        },
        datasets={"people": path},
        tags={
            "detector": scorers,
            "nsfw_scorer": nsfw_scorers or "none: no score without a classifier",
        },
        summary=f"{len(result)} looked at, people in {characters} ({scorers or 'nothing'})",
    )
