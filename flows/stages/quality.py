"""Stage `quality`: a quality and an aesthetic score per image, with the names of the scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.corpus.derivatives import Derivative, derivative_ids, score_derivatives
from components.corpus.external_scores import read_external_scores
from components.corpus.manifest import to_arrow
from components.corpus.quality import artimuse, qalign, scorer_protocol
from components.corpus.quality import classical as quality
from components.engine.map_items import EngineLimits, ItemsFailed
from components.files.parquet_files import write_parquet
from components.files.weight_folders import WeightsMissing, folder_digest
from flows.stages.contract import StageContext, StageFailed, StageResult

# Loading a large model counts against the first item's time, and CUDA reserves address space.
_MODEL_TIMEOUT_S = 1800.0
_MODEL_MEMORY_MB = 2**24
_REFUSALS = (ValueError, WeightsMissing, ItemsFailed, scorer_protocol.ScorerUnavailable)


def _score_classically(context: StageContext, derivatives: Path, path: Path) -> None:
    score_derivatives(
        quality.score_derivative,
        quality,
        quality.QUALITY_SCHEMA,
        derivatives=derivatives,
        derivative_px=context.settings.signals.derivative_px,
        destination=path,
        state_dir=context.state_dir / "shards",
        limits=EngineLimits.of(context.settings),
    )


def _classical(context: StageContext, derivatives: Path) -> pd.DataFrame:
    path = context.state_dir / "classical.parquet"
    _score_classically(context, derivatives, path)
    return pq.read_table(path).to_pandas()


def _table(context: StageContext, derivatives: Path, kind: str) -> pd.DataFrame:
    """`kind` ("quality" or "aesthetic") and its scorer from the table of `quality.scores`."""
    scores = context.settings.quality.scores
    assert scores is not None
    return read_external_scores(
        context.root / scores,
        derivative_ids(derivatives),
        [kind, f"{kind}_scorer"],
        setting="quality.scores",
        numeric=[kind],
        optional=[f"{kind}_weights"],
    ).rename(columns={"quality": "quality_score"})


def _score_by_model(
    context: StageContext,
    derivatives: Path,
    function: Callable[[Derivative], dict[str, Any]],
    module: ModuleType,
    schema: pa.Schema,
    *,
    key: dict[str, Any],
    limits: EngineLimits,
    modules: Sequence[ModuleType] = (),
) -> pd.DataFrame:
    """Scores of a large model, here or behind a server.

    Raises:
        ItemsFailed: weights or a server went away; finished items are kept.
    """
    name = module.__name__.rsplit(".", 1)[-1]
    path = context.state_dir / f"{name}.parquet"
    score_derivatives(
        function,
        module,
        schema,
        derivatives=derivatives,
        derivative_px=context.settings.signals.derivative_px,
        destination=path,
        state_dir=context.state_dir / name,
        limits=replace(
            limits,
            timeout_s=max(limits.timeout_s, _MODEL_TIMEOUT_S),
            memory_mb=max(limits.memory_mb, _MODEL_MEMORY_MB),
        ),
        key=key,
        modules=modules,
        outside=(
            WeightsMissing,
            scorer_protocol.ScorerUnavailable,
            scorer_protocol.ScorerChanged,
        ),
    )
    return pq.read_table(path).to_pandas()


def _qalign(context: StageContext, derivatives: Path) -> pd.DataFrame:
    """Q-Align in one process per machine or actor: the model fills a good part of a GPU.

    Raises:
        WeightsMissing: a file of it is not there.
        ItemsFailed: it cannot be loaded.
    """
    named = context.settings.quality.qalign_weights
    folder = qalign.check_weights(None if named is None else context.root / named)
    device = context.settings.runtime.device
    digest = folder_digest(folder)
    limits = EngineLimits.for_networks(
        context.settings, timeout_s=_MODEL_TIMEOUT_S, memory_mb=_MODEL_MEMORY_MB
    )
    return _score_by_model(
        context,
        derivatives,
        partial(qalign.score_derivative, folder=folder, digest=digest, device=device),
        qalign,
        qalign.QALIGN_SCHEMA,
        key={"weights": digest, "device": device},
        limits=replace(limits, workers=1),
    )


def _artimuse(context: StageContext, derivatives: Path) -> pd.DataFrame:
    """Scores of a scorer server; the client has its own retries.

    Raises:
        ScorerUnavailable: no server at the start.
        ItemsFailed: it went away, or became another one, before every item had a score.
    """
    url = context.settings.quality.artimuse_url
    assert url is not None
    client = scorer_protocol.ScorerClient(url)
    expected = client.identity()
    client.close()
    return _score_by_model(
        context,
        derivatives,
        partial(artimuse.score_remotely, url=url, expected=expected),
        artimuse,
        artimuse.ARTIMUSE_SCHEMA,
        key={"scorer": expected.scorer, "weights": expected.weights},
        limits=replace(EngineLimits.of(context.settings), retries=0),
        modules=(scorer_protocol,),
    )


def _join(quality_part: pd.DataFrame, aesthetic_part: pd.DataFrame) -> pd.DataFrame:
    """Quality columns of one and aesthetic columns of the other, the errors of both."""
    own = {"aesthetic", "aesthetic_scorer", "aesthetic_weights"}
    own |= {"colourfulness", "contrast", "edge_compactness"}
    left = quality_part.drop(columns=[name for name in quality_part if name in own])
    right = aesthetic_part[["image_id", *(name for name in aesthetic_part if name in own)]]
    joined = left.merge(right, on="image_id", how="left", validate="1:1")
    if "error" in aesthetic_part:
        other = aesthetic_part.set_index("image_id")["error"].reindex(joined["image_id"])
        errors = joined["error"] if "error" in joined else pd.Series(None, index=joined.index)
        both = [
            "; ".join(dict.fromkeys(text for text in pair if isinstance(text, str))) or None
            for pair in zip(errors, other, strict=True)
        ]
        joined["error"] = pd.Series(both, index=joined.index, dtype=object)
    return joined


def _scores(context: StageContext, derivatives: Path) -> pa.Table:
    """Both scores of every derivative from the scorers that the settings name."""
    settings = context.settings.quality
    parts: dict[str, pd.DataFrame] = {}
    if "classical" in (settings.scorer, settings.aesthetic_scorer):
        parts["classical"] = _classical(context, derivatives)
    if settings.scorer == "qalign":
        parts["qalign"] = _qalign(context, derivatives)
    if settings.aesthetic_scorer == "artimuse":
        parts["artimuse"] = _artimuse(context, derivatives)
    chosen = {"quality": settings.scorer, "aesthetic": settings.aesthetic_scorer}
    by_kind = {
        kind: _table(context, derivatives, kind) if scorer == "table" else parts[scorer]
        for kind, scorer in chosen.items()
    }
    return to_arrow(_join(by_kind["quality"], by_kind["aesthetic"]), quality.QUALITY_SCHEMA)


def _mean(column: pd.Series) -> float:
    return float(column.mean()) if column.notna().any() else 0.0


def run(context: StageContext) -> StageResult:
    """Write `data/quality/quality.parquet`, one row per image that could be decoded.

    Raises:
        StageFailed: external scores that are missing or incomplete, weights that are not there, or
            a scorer server that does not answer.
    """
    derivatives = context.input("signals", "derivatives.parquet")
    path = context.output_dir / "quality.parquet"
    settings = context.settings.quality
    if settings.scorer == settings.aesthetic_scorer == "classical":
        _score_classically(context, derivatives, path)
    else:
        try:
            write_parquet(_scores(context, derivatives), path)
        except _REFUSALS as problem:
            raise StageFailed(f"quality: {problem}") from None
    table = pq.read_table(path).to_pandas()
    scorers = sorted(
        {*table["quality_scorer"].dropna().unique(), *table["aesthetic_scorer"].dropna().unique()}
    )
    return StageResult(
        metrics={
            "scored": float(table["quality_score"].notna().sum()),
            "mean_quality_score": _mean(table["quality_score"]),
            "mean_aesthetic": _mean(table["aesthetic"]),
        },
        datasets={"quality": path},
        tags={"scorers": ", ".join(scorers)},
        summary=f"{len(table)} scored by {', '.join(scorers) or 'nothing'}",
    )
