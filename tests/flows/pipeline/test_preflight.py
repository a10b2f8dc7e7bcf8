from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small_project

from flows.pipeline.preflight import PipelineRefused, preflight

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "photos").mkdir()
    small_project.change_settings(tmp_path, {"ingest.source": "photos"})
    return tmp_path


@pytest.mark.parametrize(
    ("rule", "scorer", "wanted"),
    [
        ("max_drawing", "none", "nsfwjs"),
        ("max_drawing", "nudenet", "nsfwjs"),
        ("max_nsfw", "none", "another scorer than none"),
        ("max_drawing", "nsfwjs", None),
        ("max_nsfw", "nudenet", None),
    ],
)
def test_a_rule_without_its_scorer_ends_before_anything_starts(
    project: Path, rule: str, scorer: str, wanted: str | None
) -> None:
    preflight(project)
    nsfw = {"scorer": scorer, "weights": None}
    small_project.change_settings(project, {f"select.{rule}": 0.5, "people.nsfw": nsfw})
    if wanted is None:
        preflight(project)
        return
    with pytest.raises(PipelineRefused) as refused:
        preflight(project)
    assert str(refused.value) == (
        f"select.{rule} = 0.5 would reject every photograph: nothing scores them; set "
        f"people.nsfw.scorer to {wanted}, or select.{rule} to null"
    )
