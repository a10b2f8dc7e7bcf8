"""The table of scorers, and scores of real photographs without a stage."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from components.corpus.quality.scorers import SCORERS, Scorer
from components.corpus.quality.scoring import join_kinds, score_photographs
from components.files.parquet_files import write_parquet
from components.images.decoding import decode_rgb, read_rgb
from components.settings.schema import SettingsError, parse_settings
from components.signals.candidate import DERIVATIVES_SCHEMA, derivative_jpeg

ROOT = Path(__file__).parents[4]
PHOTOGRAPHS = ("ng-32703", "galen-crout-175291", "spacex-81773")


BRIGHTNESS = """\
from components.corpus.quality.scorer import formula, score_row
from components.images.decoding import decode_rgb
from components.settings.section import NonNegative, Section

class BrightnessSettings(Section):
    full: NonNegative

def score_derivative(derivative):
    mean = decode_rgb(derivative.jpeg).pixels.mean() / 255
    return score_row("quality", mean, "brightness-v1")

def open_scorer(job, kind):
    assert job.settings.quality.own("brightness", BrightnessSettings).full == 1.0
    return formula(score_derivative, job, kind)
"""


@pytest.fixture
def params() -> dict[str, Any]:
    """Values of params.yaml."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["runtime"]["workers"] = 1
    return values


@pytest.fixture(scope="module")
def derivatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small copies of bundled photographs, as the stage `signals` leaves them."""
    rows = []
    for n, name in enumerate(PHOTOGRAPHS):
        pixels = read_rgb(ROOT / "data" / "sample" / f"{name}.jpg").pixels
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        rows.append({"image_id": f"{n:064x}", **size, "jpeg": derivative_jpeg(pixels, 256)})
    path = tmp_path_factory.mktemp("signals") / "derivatives.parquet"
    write_parquet(pa.Table.from_pylist(rows, schema=DERIVATIVES_SCHEMA), path)
    return path


def test_a_new_scorer_is_one_module_and_one_entry(
    params: dict[str, Any], derivatives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file, because the workers import it.
    (tmp_path / "brightness_scorer.py").write_text(BRIGHTNESS)
    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("brightness_scorer")
    entry = Scorer(made.open_scorer, ("quality",), (0.0, 1.0), settings=made.BrightnessSettings)
    monkeypatch.setitem(SCORERS, "brightness", entry)  # type: ignore[arg-type]
    params["quality"] |= {"scorer": "brightness", "brightness": {"full": 1.0}}
    settings = parse_settings(params)
    score_photographs(derivatives, tmp_path / "quality.parquet", settings, state_dir=tmp_path)
    table = pq.read_table(tmp_path / "quality.parquet").to_pandas()
    assert set(table["quality_scorer"]) == {"brightness-v1"}
    assert set(table["aesthetic_scorer"]) == {"classical-aesthetic-v1"}
    for score, derivative in zip(
        table["quality_score"], pq.read_table(derivatives).to_pylist(), strict=True
    ):
        assert score == decode_rgb(derivative["jpeg"]).pixels.mean() / 255


def test_every_formula_stays_within_the_range_of_its_entry(
    params: dict[str, Any], derivatives: Path, tmp_path: Path
) -> None:
    settings = parse_settings(params)
    score_photographs(derivatives, tmp_path / "quality.parquet", settings, state_dir=tmp_path)
    table = pq.read_table(tmp_path / "quality.parquet").to_pandas()
    low, high = SCORERS["classical"].score_range or (0.0, 0.0)
    for column in ("quality_score", "aesthetic"):
        assert table[column].between(low, high).all()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"scorer": "qalgin"},
            "quality.scorer = 'qalgin': input should be 'classical', 'table' or 'qalign'; did you "
            "mean 'qalign'?",
        ),
        (
            {"aesthetic_scorer": "qalign"},
            "quality.aesthetic_scorer = 'qalign': input should be 'classical', 'table' or "
            "'artimuse'",
        ),
        ({"scorer": "qalign"}, "quality.qalign_weights must be set for quality.scorer 'qalign'"),
        ({"scorer": "table"}, "quality.scores must be set for quality.scorer 'table'"),
        (
            {"aesthetic_scorer": "artimuse"},
            "quality.artimuse_url must be set for quality.aesthetic_scorer 'artimuse'",
        ),
    ],
)
def test_the_settings_refuse_what_no_scorer_could_start_with(
    params: dict[str, Any], change: dict[str, Any], line: str
) -> None:
    values = copy.deepcopy(params)
    values["quality"] |= change
    with pytest.raises(SettingsError) as problem:
        parse_settings(values)
    assert len(str(problem.value).splitlines()) == 1
    assert str(problem.value).endswith(line)


def test_both_kinds_keep_their_columns_and_a_shared_complaint_is_said_once() -> None:
    quality = pd.DataFrame(
        {"image_id": ["a", "b"], "quality_score": [1.0, None], "error": [None, "too small"]}
    )
    aesthetic = pd.DataFrame(
        {"image_id": ["b", "a"], "aesthetic": [None, 2.0], "error": ["too small", "no answer"]}
    )
    joined = join_kinds(quality, aesthetic)
    assert joined["aesthetic"][0] == 2.0
    assert joined["error"].tolist() == ["no answer", "too small"]
