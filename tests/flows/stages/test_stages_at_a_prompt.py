"""What a stage does, three lines at a prompt do, to the byte."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

from components.corpus.quality.scoring import score_photographs
from components.settings.schema import Settings, load_settings, parse_settings
from components.telemetry.metric_log import MetricLog
from flows.stages.contract import StageContext

ROOT = Path(__file__).parents[3]
STAGES = ("ingest", "signals", "quality")
PHOTOGRAPHS = ("ng-32703", "galen-crout-175291", "white-and-multicolored-portrait-3x4")


def _settings() -> Settings:
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    contracts = ROOT / "data" / "contracts"
    values["validation"] = {name: str(contracts / f"{name}.yaml") for name in values["validation"]}
    values["runtime"] |= {"workers": 1}
    # The first image of a process compiles the kernels.
    values["signals"] |= {"timeout_s": 120.0}
    return parse_settings(values)


SETTINGS = _settings()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the bundled photographs, and what the stages made of them."""
    root = tmp_path_factory.mktemp("project")
    sample = root / "data" / "sample"
    sample.mkdir(parents=True)
    for name in ("ATTRIBUTION.csv", "captions.jsonl", *(f"{name}.jpg" for name in PHOTOGRAPHS)):
        shutil.copy(ROOT / "data" / "sample" / name, sample)
    for stage in STAGES:
        state = root / "runs" / stage
        metrics = MetricLog(state / "metrics.jsonl")
        context = StageContext(stage, SETTINGS, root, state, metrics)
        importlib.import_module(f"flows.stages.{stage}").run(context)
    return root


def test_quality(project: Path, tmp_path: Path) -> None:
    derivatives = project / "data" / "signals" / "derivatives.parquet"
    score_photographs(derivatives, tmp_path / "quality.parquet", SETTINGS, state_dir=tmp_path)
    stage = project / "data" / "quality" / "quality.parquet"
    assert (tmp_path / "quality.parquet").read_bytes() == stage.read_bytes()
