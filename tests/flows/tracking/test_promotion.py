"""The stage `promote`, its line for the terminal, and the baseline that it leaves."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_project
import yaml

from components.evaluation.statistics.scores import Score, scores_table
from components.files.weight_folders import file_digest
from components.settings.schema import parse_settings
from components.telemetry.metric_log import MetricLog
from flows.commands.refusals import FAILED, refusal
from flows.stages import promote
from flows.stages.contract import StageContext, StageFailed, StageResult
from flows.tracking.promotion import DECISION, SCORES, PromotionRefused, keep_baseline
from flows.tracking.store_problems import TrackingAway

Typed = Callable[..., subprocess.CompletedProcess[str]]
RULES = [{"system": "generated", "metric": "glcm_score", "margin": 0.1}]


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    """A folder with the registry's names."""
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "mlflow/tracking.yaml").write_bytes((root / "mlflow/tracking.yaml").read_bytes())
    return tmp_path


def _project(project: Path, shift: float, noise: float) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(1.0, 0.2, 12)
    errors = np.random.default_rng(1).normal(shift, noise, 12) if noise else np.full(12, shift)
    table = scores_table(
        Score(f"{i}.png", "generated", 64, 64, "glcm_score", "g/v1", float(values[i] + errors[i]))
        for i in range(12)
    )
    (project / "data/evaluate").mkdir(parents=True, exist_ok=True)
    table.to_parquet(project / "data/evaluate/scores.parquet", index=False)
    (project / "data/evaluate/metrics.json").write_text(json.dumps(small_project.LEARNED))
    for weights in ("data/vae/autoencoder", "data/dit_stage2/ema"):
        (project / weights).mkdir(parents=True, exist_ok=True)
        (project / weights / "model.safetensors").write_bytes(b"weights")


def _run(root: Path, project: Path, baseline: dict[str, str] | None) -> StageResult:
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["promote"] |= {"baseline": baseline, "non_inferiority": RULES}
    settings = parse_settings(values)
    log = MetricLog(project / "runs" / "metrics.jsonl")
    return promote.run(StageContext("promote", settings, project, project / "runs", log))


def test_the_first_champion_becomes_the_baseline_and_a_worse_model_is_refused(
    root: Path, project: Path
) -> None:
    _project(project, 0.0, 0.0)
    first = _run(root, project, None)
    assert first.metrics["promoted"] == 1.0
    assert first.summary.endswith("no baseline yet: generated.glcm_score not compared")
    assert first.promotions[0]["tags"]["gate.baseline"] == "none yet"

    baseline = yaml.safe_load(keep_baseline(project).split("\n", 1)[1])["promote"]["baseline"]
    assert (project / baseline["scores"]).is_file()
    _project(project, -0.3, 0.05)
    worse = _run(root, project, baseline)
    assert worse.metrics["promoted"] == 0.0
    assert worse.metrics["margin.generated.glcm_score"] < -0.15
    assert worse.summary.startswith("not promoted: generated.glcm_score: improvement -0.2")
    assert "at most 0.1 may be lost" in worse.summary
    assert all(one["alias"] is None for one in worse.promotions)
    assert worse.promotions[0]["tags"]["gate.baseline"] == baseline["sha256"]
    written = json.loads((project / "data/promote/metrics.json").read_text())
    assert written == worse.metrics
    with pytest.raises(PromotionRefused, match=r"not promoted: generated.glcm_score"):
        keep_baseline(project)

    _project(project, -0.02, 0.01)
    assert _run(root, project, baseline).metrics["promoted"] == 1.0


def test_the_same_numbers_give_the_same_bytes(root: Path, project: Path) -> None:
    _project(project, 0.0, 0.0)
    _run(root, project, None)
    baseline = yaml.safe_load(keep_baseline(project).split("\n", 1)[1])["promote"]["baseline"]
    decisions = []
    for _ in range(2):
        _run(root, project, baseline)
        decisions.append((project / "data/promote/decision.json").read_bytes())
    assert decisions[0] == decisions[1]


def test_another_file_than_the_named_baseline_stops_the_stage(root: Path, project: Path) -> None:
    _project(project, 0.0, 0.0)
    with pytest.raises(StageFailed, match=r"promote: promote.baseline.scores = gone.parquet"):
        _run(root, project, {"scores": "gone.parquet", "sha256": "0" * 64})


def test_scores_that_were_measured_since_are_no_baseline(root: Path, project: Path) -> None:
    _project(project, 0.0, 0.0)
    _run(root, project, None)
    _project(project, 0.3, 0.0)
    with pytest.raises(PromotionRefused, match=r"scores.parquet is not what .* decided on"):
        keep_baseline(project)
    assert not (project / "baselines").exists()


@pytest.fixture
def decided(toy: Path) -> Path:
    """A project whose gate said yes, on files that are true in form."""
    scores = toy / "data/evaluate/scores.parquet"
    scores.parent.mkdir(parents=True)
    scores.write_bytes(b"scores")
    decision = {
        "promoted": True,
        "alias": "candidate",
        "rules": [{"name": "steps", "passed": True, "value": None, "threshold": 1.0}],
        "not_compared": [],
        "baseline": None,
        "digests": {"transformer": "ab" * 32},
        "paths": {"transformer": "data/dit_stage2/ema"},
        "scores_sha256": file_digest(scores),
    }
    (toy / "data/promote").mkdir(parents=True)
    (toy / DECISION).write_text(json.dumps(decision))
    return toy


@pytest.mark.parametrize("text", ['{"promo', "{}", "[]", '{"promoted": true, "rules": [1]}'])
def test_a_torn_decision_is_one_line(decided: Path, typed: Typed, text: str) -> None:
    (decided / DECISION).write_text(text)
    done = typed(decided, "promote")
    assert done.returncode == 1
    assert "decision.json" in done.stderr
    assert "`ultraflux run` decides again" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_scores_no_alias_is_given(
    decided: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (decided / SCORES).unlink()
    # Whoever asked that server would be told that it is away.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    done = typed(decided, "promote", "--keep-baseline")
    assert done.returncode == 1
    assert done.stderr.startswith("error: data/evaluate/scores.parquet is missing")


def test_a_decision_of_older_code_is_no_baseline_and_said_to_be_old(decided: Path) -> None:
    values = json.loads((decided / DECISION).read_text())
    del values["scores_sha256"]
    (decided / DECISION).write_text(json.dumps(values))
    with pytest.raises(PromotionRefused, match=r"decision\.json is of older code"):
        keep_baseline(decided)


def test_a_server_that_is_away_is_one_line(
    decided: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingAway, match=r"^MLflow at .* did not take the models") as found:
        typed(decided, "promote")
    assert refusal(found.value, ["promote"]) == (str(found.value), FAILED)
    assert "\n" not in str(found.value)
