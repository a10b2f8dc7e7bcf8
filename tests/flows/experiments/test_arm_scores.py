"""Numbers of an arm, as `ultraflux evaluate` left them in its tree."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from components.evaluation.statistics.scores import GENERATED
from components.evaluation.suites.ablation import Arm
from components.metrics.cards import CARDS
from flows.experiments import ablation_runs


def test_a_number_of_sets_that_was_not_finite_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_sets = [card.id for card in CARDS if card.needs == "set pair"][:2]
    out = tmp_path / "runs" / "ablation"
    out.mkdir(parents=True)
    values = {f"{GENERATED}.{of_sets[0]}": None, f"{GENERATED}.{of_sets[1]}": 2}
    (out / "metrics.json").write_text(json.dumps({"metrics": values}))
    table = pd.DataFrame({"system": [], "metric": [], "value": []})
    for folder in (out, tmp_path / "data" / "evaluate"):
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / "scores.parquet")
    monkeypatch.setattr(ablation_runs, "arm_tree", lambda *_: tmp_path)
    monkeypatch.setattr(ablation_runs, "_ultraflux", lambda *_: 0)
    arm = Arm("c-model", "C", {})
    scores = ablation_runs.run_arm(
        tmp_path, "data-model", arm, ablation_runs.SuiteChoice("aesthetic-eval-4096")
    )
    assert scores.of_sets == {of_sets[1]: 2.0}
