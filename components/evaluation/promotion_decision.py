"""Whether the models that the pipeline trained may become the champions, and what was asked.

decision = decide_promotion(root, load_settings(root / "params.yaml"))
write_decision(decision, root / "data" / "promote")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from components.evaluation.statistics.gate import decide
from components.evaluation.statistics.non_inferiority import baseline_scores
from components.files.weight_folders import file_digest, folder_digest
from components.files.whole_files import write_text
from components.settings.schema import Settings


def trained_models(settings: Settings) -> dict[str, Path]:
    """Folders below the root, by kind."""
    return {
        "autoencoder": Path("data", "vae", "autoencoder"),
        "transformer": Path("data", "dit_stage2", settings.generate.weights),
    }


def decide_promotion(
    root: Path, settings: Settings, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The gate's decision on the evaluated models, with the folders that it is about.

    Args:
        root: repository root; `data/evaluate` and the models' folders are read.
        settings: all settings.
        say: gets the power of each comparison before it is decided.

    Returns:
        JSON-ready: what `gate.decide` returns, `paths`, and the digest of the scores.

    Raises:
        FileNotFoundError: a stage before this one has not run.
        BaselineUnusable: `promote.baseline` names a file that is missing or another one.
    """
    evaluated = root / "data" / "evaluate"
    models = trained_models(settings)
    decision = decide(
        json.loads((evaluated / "metrics.json").read_text(encoding="utf-8")),
        settings.promote,
        {kind: folder_digest(root / folder) for kind, folder in models.items()},
        candidate=pd.read_parquet(evaluated / "scores.parquet"),
        baseline=baseline_scores(root, settings.promote.baseline),
        seed=settings.project.seed,
        say=say,
    )
    return decision | {
        "paths": {kind: folder.as_posix() for kind, folder in models.items()},
        # A baseline is of the models that were promoted, never of what was measured since.
        "scores_sha256": file_digest(evaluated / "scores.parquet"),
    }


def decision_numbers(decision: Mapping[str, Any]) -> dict[str, float]:
    """`promoted` as 0 or 1, and the margin of every rule that has one."""
    return {"promoted": float(decision["promoted"])} | {
        f"margin.{rule['name']}": rule["margin"]
        for rule in decision["rules"]
        if rule["margin"] is not None
    }


def write_decision(decision: Mapping[str, Any], folder: Path) -> Path:
    """Write `decision.json` and `metrics.json`.

    Args:
        decision: from `decide_promotion`.
        folder: exists.

    Returns:
        Path of the decision.
    """
    output = folder / "decision.json"
    write_text(output, json.dumps(decision, indent=1) + "\n")
    numbers = decision_numbers(decision)
    write_text(folder / "metrics.json", json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    return output
