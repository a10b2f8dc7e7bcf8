"""The scorers that the settings name, run over the derivatives and joined into one table.

At a prompt, without the stage::

    settings = load_settings(Path("params.yaml"))
    derivatives = Path("data/signals/derivatives.parquet")
    score_photographs(derivatives, Path("quality.parquet"), settings, state_dir=Path("runs/mine"))
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from components.corpus.derivatives import score_derivatives
from components.corpus.manifest import to_arrow
from components.corpus.quality.kinds import Kind
from components.corpus.quality.scorer import (
    QUALITY_SCHEMA,
    DerivativeScorer,
    Opened,
    ScoringJob,
)
from components.corpus.quality.scorer_protocol import ScorerUnavailable
from components.corpus.quality.scorers import SCORERS, chosen_scorers
from components.engine.map_items import ItemsFailed
from components.files.parquet_files import write_parquet
from components.files.weight_folders import WeightsMissing
from components.settings.schema import Settings

SCORING_REFUSED = (ValueError, WeightsMissing, ItemsFailed, ScorerUnavailable)
"""What `score_photographs` raises for a reason that a person can remove; each is one line."""


def _run(scorer: DerivativeScorer, job: ScoringJob, state_dir: Path, path: Path) -> None:
    score_derivatives(
        scorer.function,
        scorer.module,
        scorer.schema,
        derivatives=job.derivatives,
        derivative_px=job.settings.signals.derivative_px,
        destination=path,
        state_dir=state_dir,
        limits=scorer.limits,
        key=scorer.key,
        modules=scorer.modules,
        outside=scorer.outside,
    )


def _frame(scorer: Opened, job: ScoringJob, state_dir: Path) -> pd.DataFrame:
    if isinstance(scorer, pd.DataFrame):
        return scorer
    path = state_dir / "scores.parquet"
    _run(scorer, job, state_dir, path)
    return pq.read_table(path).to_pandas()


def join_kinds(quality: pd.DataFrame, aesthetic: pd.DataFrame) -> pd.DataFrame:
    """Quality columns of one table and aesthetic columns of the other, the errors of both.

    Args:
        quality: one row per image; may hold aesthetic columns, which are dropped.
        aesthetic: one row per image; only its aesthetic columns are taken.
    """
    own = {"aesthetic", "aesthetic_scorer", "aesthetic_weights"}
    own |= {"colourfulness", "contrast", "edge_compactness"}
    left = quality.drop(columns=[name for name in quality if name in own])
    right = aesthetic[["image_id", *(name for name in aesthetic if name in own)]]
    joined = left.merge(right, on="image_id", how="left", validate="1:1")
    if "error" in aesthetic:
        other = aesthetic.set_index("image_id")["error"].reindex(joined["image_id"])
        errors = joined["error"] if "error" in joined else pd.Series(None, index=joined.index)
        # The same complaint of both (a picture that is too small) is said once.
        both = [
            "; ".join(dict.fromkeys(text for text in pair if isinstance(text, str))) or None
            for pair in zip(errors, other, strict=True)
        ]
        joined["error"] = pd.Series(both, index=joined.index, dtype=object)
    return joined


def score_photographs(
    derivatives: Path,
    destination: Path,
    settings: Settings,
    *,
    state_dir: Path,
    root: Path = Path(),
) -> None:
    """Write a quality and an aesthetic score per derivative, with the names of their scorers.

    Args:
        derivatives: what the stage `signals` left.
        destination: Parquet file to write, columns of `QUALITY_SCHEMA`.
        settings: `quality` names the scorers; `signals` and `runtime` bound them.
        state_dir: survives kills; no image is scored twice.
        root: where relative paths in the settings start.

    Raises:
        ValueError: external scores that are missing or incomplete.
        WeightsMissing: a file of a model is not there.
        ScorerUnavailable: no scorer server at the start.
        ItemsFailed: weights or a server went away; what was scored is kept.
    """
    job = ScoringJob(settings, root, derivatives)
    chosen = chosen_scorers(settings.quality)
    # All are opened before the first runs: missing weights are no news after hours of scoring.
    opened: dict[Kind, Opened] = {
        kind: SCORERS[name].open(job, kind) for kind, name in chosen.items()
    }
    quality = opened["quality"]
    both_in_one = isinstance(quality, DerivativeScorer) and quality.schema == QUALITY_SCHEMA
    if chosen["quality"] == chosen["aesthetic"] and both_in_one:
        assert isinstance(quality, DerivativeScorer)
        # One pass gives whole rows, which go to the file shard by shard: a million fit nowhere.
        _run(quality, job, state_dir / chosen["quality"], destination)
        return
    # A folder for each kind: one scorer may give both, with columns of their own.
    frames = {
        kind: _frame(scorer, job, state_dir / f"{kind}-{chosen[kind]}")
        for kind, scorer in opened.items()
    }
    table = to_arrow(join_kinds(frames["quality"], frames["aesthetic"]), QUALITY_SCHEMA)
    write_parquet(table, destination)
