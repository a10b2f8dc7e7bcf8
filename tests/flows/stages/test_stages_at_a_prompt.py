"""What a stage does, three lines at a prompt do, to the byte."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from components.corpus.candidate_signals import measure_candidates
from components.corpus.captions.captioning import caption_photographs
from components.corpus.listing.source_table import describe_source
from components.corpus.manifest import read_table, write_table
from components.corpus.people.looking import look_for_people
from components.corpus.quality.scoring import score_photographs
from components.corpus.selection.join_signals import join_signals
from components.corpus.selection.rules import select
from components.corpus.sources.collect import collect
from components.engine.map_items import EngineLimits
from components.settings.schema import Settings, load_settings, parse_settings
from components.telemetry.metric_log import MetricLog
from flows.stages.contract import StageContext

ROOT = Path(__file__).parents[3]
STAGES = ("source", "ingest", "signals", "quality", "people", "select", "caption")
PHOTOGRAPHS = ("ng-32703", "galen-crout-175291", "white-and-multicolored-portrait-3x4")


def _settings() -> Settings:
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    contracts = ROOT / "data" / "contracts"
    values["validation"] = {name: str(contracts / f"{name}.yaml") for name in values["validation"]}
    values["runtime"] |= {"workers": 1}
    values["people"] |= {"boxes": str(ROOT / "data" / "scores" / "sample_people.csv")}
    # The first image of a process compiles the kernels.
    values["signals"] |= {"timeout_s": 120.0}
    # The smallest of the bundled photographs, for speed: the published thresholds keep none.
    values["select"] |= {"min_pixels": 1, "min_entropy_bits": 1.0, "max_flat_fraction": 1.0}
    values["select"] |= {"exclusions": str(ROOT / "conf" / "exclusions.csv")}
    return parse_settings(values)


SETTINGS = _settings()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the bundled photographs, and what the stages made of them."""
    root = tmp_path_factory.mktemp("project")
    sample = root / "data" / "sample"
    sample.mkdir(parents=True)
    files = [f"{name}.jpg" for name in PHOTOGRAPHS]
    for name in ("ATTRIBUTION.csv", *files):
        shutil.copy(ROOT / "data" / "sample" / name, sample)
    lines = (ROOT / "data" / "sample" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [line for line in lines if json.loads(line)["file"] in files]
    (sample / "captions.jsonl").write_text("\n".join(ours) + "\n", encoding="utf-8")
    for stage in STAGES:
        state = root / "runs" / stage
        metrics = MetricLog(state / "metrics.jsonl")
        context = StageContext(stage, SETTINGS, root, state, metrics)
        importlib.import_module(f"flows.stages.{stage}").run(context)
    return root


def equal(project: Path, stage: str, file: Path) -> bool:
    return file.read_bytes() == (project / "data" / stage / file.name).read_bytes()


def test_source_and_ingest(project: Path, tmp_path: Path) -> None:
    table = tmp_path / "listing.parquet"
    limits = EngineLimits.of(SETTINGS)
    described = describe_source(SETTINGS.ingest, table, root=project, limits=limits)
    assert (described.candidates, described.read) == (len(PHOTOGRAPHS), 0)
    assert equal(project, "source", table)
    found = collect(
        SETTINGS.ingest, tmp_path, root=project, state_dir=tmp_path / "state", listing=table
    )
    assert found.candidates == len(PHOTOGRAPHS)
    for name in ("manifest", "losses", "unknown_columns"):
        assert equal(project, "ingest", tmp_path / f"{name}.parquet")
    assert equal(project, "ingest", tmp_path / "coverage.json")


def test_signals(project: Path, tmp_path: Path) -> None:
    manifest = read_table(project / "data" / "ingest" / "manifest.parquet")
    measure_candidates(manifest, tmp_path, SETTINGS, root=project, state_dir=tmp_path / "state")
    assert equal(project, "signals", tmp_path / "signals.parquet")
    assert equal(project, "signals", tmp_path / "derivatives.parquet")


def test_quality(project: Path, tmp_path: Path) -> None:
    derivatives = project / "data" / "signals" / "derivatives.parquet"
    score_photographs(derivatives, tmp_path / "quality.parquet", SETTINGS, state_dir=tmp_path)
    assert equal(project, "quality", tmp_path / "quality.parquet")


def test_people(project: Path, tmp_path: Path) -> None:
    manifest = read_table(project / "data" / "ingest" / "manifest.parquet")
    derivatives = project / "data" / "signals" / "derivatives.parquet"
    path = tmp_path / "people.parquet"
    look_for_people(derivatives, manifest, path, SETTINGS, state_dir=tmp_path)
    assert equal(project, "people", path)


def test_select(project: Path, tmp_path: Path) -> None:
    manifest = read_table(project / "data" / "ingest" / "manifest.parquet")
    measured = (
        pq.read_table(project / "data" / stage / f"{stage}.parquet").to_pandas()
        for stage in ("signals", "quality", "people")
    )
    table = join_signals(manifest, *measured, SETTINGS)
    selected = select(table, SETTINGS.select, SETTINGS.project.seed)
    write_table(selected, tmp_path / "manifest.parquet")
    assert equal(project, "select", tmp_path / "manifest.parquet")


def test_caption(project: Path, tmp_path: Path) -> None:
    selected = project / "data" / "select" / "manifest.parquet"
    derivatives = project / "data" / "signals" / "derivatives.parquet"
    output = tmp_path / "manifest.parquet"
    caption_photographs(selected, derivatives, SETTINGS, output, root=project)
    assert equal(project, "caption", tmp_path / "manifest.parquet")
