"""The recipes of docs/extending.md, followed word for word in a copy of the project, and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import small_project
import trivial_clone
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
STEP = re.compile(
    r"^(?:New file `(?P<new>[^`]+)`"
    r"|In `(?P<old>[^`]+)`, (?P<how>after|instead of) the line `(?P<line>[^`]+)`"
    r"|Run(?: [^\n]*)?):\n\n```\w+\n(?P<text>.*?)\n```$",
    re.MULTILINE | re.DOTALL,
)
COPIED = {"components", "flows", "conf", "mlflow", "data", ".dvc"}
COPIED_FILES = {"dvc.yaml", "params.yaml", "pyproject.toml", ".dvcignore", ".gitignore"}


def steps(title: str) -> Iterator[re.Match[str]]:
    """Steps of one section of the page."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    yield from STEP.finditer(section)


def copy_project(target: Path) -> None:
    # What belongs to the project: in a clone that has run, data/ holds terabytes of results.
    trivial_clone.copy_files(
        target, lambda file: file.partition("/")[0] in COPIED or file in COPIED_FILES
    )
    small_project.keep_photos(target, small_project.PHOTOS[:2])
    for path in (target / "data" / "sample").glob("*.jpg"):
        with Image.open(path) as photo:
            # A recipe is as right with a sixteenth of the pixels, and signals are soon measured.
            photo.reduce(4).save(path, quality=90)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)


def follow(title: str, project: Path) -> str:
    """Take every step of a recipe; what its commands print."""
    copy_project(project)
    printed = ""
    for step in steps(title):
        text = step["text"] + "\n"
        if step["new"]:
            path = project / step["new"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif step["old"]:
            path = project / step["old"]
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            found = [n for n, line in enumerate(lines) if step["line"] in line]
            assert found, f"{step['old']} has no line {step['line']!r}"
            at = found[0]
            lines[at : at + 1] = [text] if step["how"] == "instead of" else [lines[at], text]
            path.write_text("".join(lines), encoding="utf-8")
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=project,
                env=os.environ | {"PYTHONPATH": str(project), "MLFLOW_TRACKING_URI": ""},
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            printed += done.stdout
    return printed


def edits(title: str) -> list[tuple[str, int]]:
    """(file, lines added) of a recipe, blank lines not counted."""
    return [
        (step["new"] or step["old"], sum(1 for line in step["text"].splitlines() if line.strip()))
        for step in steps(title)
        if step["new"] or step["old"]
    ]


def test_a_metric_is_one_module_and_one_row(tmp_path: Path) -> None:
    follow("A metric", tmp_path)
    scores = pd.read_parquet(tmp_path / "measured" / "scores.parquet")
    assert set(scores["metric"]) == {"brightness"}
    assert scores["value"].between(0.01, 0.99).all()
    (module, _), *registry = edits("A metric")
    assert module.startswith("components/metrics/catalog/")
    # Its import and its row.
    assert registry == [("components/metrics/registry.py", 1)] * 2


def test_an_objective_is_one_function_and_one_row(tmp_path: Path) -> None:
    printed = follow("An objective", tmp_path)
    zero, off = re.findall(r"tensor\(\[([^]]+)\]\)", printed)
    assert [float(value) for value in zero.split(",")] == [0.0, 0.0]
    expected = (1.0 + 0.1**2) ** 0.5 - 0.1
    assert [float(value) for value in off.split(",")] == pytest.approx([expected] * 2, abs=1e-4)
    assert edits("An objective")[1:] == [("components/objectives/objective.py", 1)] * 2


@pytest.mark.slow
def test_a_quality_scorer_is_one_module_and_one_entry(tmp_path: Path) -> None:
    follow("A quality scorer", tmp_path)
    table = pd.read_parquet(tmp_path / "data" / "quality" / "quality.parquet")
    assert set(table["quality_scorer"]) == {"brightness-v1"}
    assert set(table["aesthetic_scorer"]) == {"classical-aesthetic-v1"}
    files = {file for file, _ in edits("A quality scorer")}
    assert files == {
        "components/corpus/quality/brightness.py",
        "components/corpus/quality/scorers.py",
    }


@pytest.mark.slow
def test_a_stage_is_one_module_its_settings_and_a_short_stanza(tmp_path: Path) -> None:
    follow("A stage", tmp_path)
    colours = json.loads((tmp_path / "data" / "palette" / "palette.json").read_text())
    assert len(colours) == 8
    lengths = dict(edits("A stage"))
    assert lengths["dvc.yaml"] <= 15
    # Only the new stage is there: nothing else was touched by the recipe's run.
    made = {path.name for path in (tmp_path / "data").iterdir() if path.is_dir()}
    assert made == {"sample", "contracts", "scores", "code", "palette"}
    assert (tmp_path / "data" / "code" / "palette.json").is_file()


@pytest.mark.slow
def test_a_backbone_is_one_folder_and_one_line_of_the_registry(tmp_path: Path) -> None:
    assert follow("A backbone", tmp_path).endswith("trained\n")
    files = {file for file, _ in edits("A backbone")}
    assert {file for file in files if not file.startswith("components/models/toy/")} == {
        "components/models/backbones.py"
    }
