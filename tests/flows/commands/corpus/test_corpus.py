"""`ultraflux corpus` and `ultraflux select --what-if` over real files and DVC revisions."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from components.corpus.manifest import SCHEMA, write_table
from components.corpus.selection.rules import select
from components.settings.schema import load_settings
from flows.cli import app
from flows.commands.corpus import corpus as corpus_commands

ROOT = Path(__file__).parents[4]


def manifest(entropies: list[float]) -> pd.DataFrame:
    table = pd.DataFrame({"entropy_bits": entropies}).assign(
        image_id=[f"{n:064x}" for n in range(len(entropies))],
        uri=[f"{n}.jpg" for n in range(len(entropies))],
        width=4000,
        height=4000,
        integrity="ok",
        duplicate_of=None,
        flat_fraction=0.1,
        channel="general",
    )
    rules = load_settings(ROOT / "params.yaml").select
    return select(table.reindex(columns=SCHEMA.names), rules)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("params.yaml", "dvc.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "data" / "select").mkdir(parents=True)
    monkeypatch.setattr(corpus_commands, "project_root", lambda: tmp_path)
    return tmp_path


def test_what_if_says_how_many_rows_flip(project: Path) -> None:
    write_table(manifest([7.5, 6.9, 6.0]), project / "data" / "select" / "manifest.parquet")
    done = CliRunner().invoke(app, ["select", "--what-if", "entropy_bits=6.8", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert (document["gained"], document["lost"]) == (1, 0)
    assert document["gained_examples"][0]["uri"] == "1.jpg"
    assert document["now"]["rejected_entropy"] == 2
    shown = CliRunner().invoke(app, ["select", "--what-if", "entropy_bits=6.8"])
    assert "1 newly kept" in shown.output
    wrong = CliRunner().invoke(app, ["select", "--what-if", "entropie=6.8"])
    assert wrong.exit_code == 2


def test_two_revisions_are_compared_from_the_cache(project: Path) -> None:
    def run(*command: str) -> None:
        subprocess.run(command, cwd=project, check=True, capture_output=True)

    (project / "dvc.yaml").unlink()
    run("git", "init", "-q")
    run("git", "config", "user.email", "a@b.c")
    run("git", "config", "user.name", "a")
    run("dvc", "init", "-q")
    path = project / "data" / "select" / "manifest.parquet"
    for entropies in ([7.5, 6.9], [7.5, 7.1, 6.0]):
        write_table(manifest(entropies), path)
        run("dvc", "add", "-q", str(path))
        run("git", "add", "-A")
        run("git", "commit", "-q", "-m", "version")
    output = project / "rows.parquet"
    call = ["corpus", "diff", "HEAD~1", "HEAD", "--json", "--output", str(output)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 1, done.output
    document = json.loads(done.output)
    assert document["changes"]["added"] == document["changes"]["newly_kept"] == 1
    assert document["rules"]["newly_kept"] == {"entropy": 1}
    rows = pq.read_table(output).to_pylist()
    assert [(row["uri"], row["change"]) for row in rows] == [
        ("1.jpg", "newly_kept"),
        ("2.jpg", "added"),
    ]
    same = CliRunner().invoke(app, ["corpus", "diff", str(path), "HEAD"])
    assert same.exit_code == 0, same.output
    unknown = CliRunner().invoke(app, ["corpus", "diff", "HEAD~7", "HEAD"])
    assert unknown.exit_code == 2


def test_drift_and_datasheet_write_their_pages(project: Path) -> None:
    path = project / "a.parquet"
    write_table(manifest([7.5, 7.2, 7.1, 7.9]), path)
    page, sheet = project / "drift.html", project / "sheet.html"
    for link in (page, sheet):
        link.symlink_to(project / f"real-{link.name}")
    call = ["corpus", "drift", str(path), str(path), "--output", str(page)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert json.loads(page.with_suffix(".json").read_text())["status"] == "stable"
    done = CliRunner().invoke(app, ["corpus", "datasheet", str(path), "--output", str(sheet)])
    assert done.exit_code == 0, done.output
    assert "4 kept" in sheet.read_text()
    assert page.is_symlink()
    assert sheet.is_symlink()
    folder = str(project / "data")
    for wrong, said in (
        (["drift", str(path), str(path), "--output", "x.json"], "--output x.json: name the page"),
        (["drift", str(path), str(path), "--output", folder], "data: a folder; name a file"),
        (["datasheet", str(path), "--output", folder], "data: a folder; name a file"),
    ):
        done = CliRunner().invoke(app, ["corpus", *wrong])
        assert done.exit_code == 2, done.output
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_one_changed_row_of_eleven_is_told_from_drift_by_the_command(project: Path) -> None:
    entropies = [7.0 + 0.09 * n for n in range(11)]
    paths = project / "before.parquet", project / "after.parquet"
    for path, first in zip(paths, (7.0, 7.4), strict=True):
        write_table(manifest([first, *entropies[1:]]), path)
    call = ["corpus", "drift", *map(str, paths), "--output", str(project / "drift.html")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "too few rows to tell (11 rows before, 11 after)" in done.output
    assert "too few rows entropy_bits: PSI" in done.output
    report = json.loads((project / "drift.json").read_text())
    assert report["status"] == "too_few_rows"
    for path, shift in zip(paths, (0.0, 0.4), strict=True):
        write_table(manifest([e % 0.6 + 7 + shift for e in entropies * 20]), path)
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 1, done.output
    assert "drifted (220 rows before, 220 after)" in done.output
    told = CliRunner().invoke(app, ["corpus", "drift", "--help"]).output
    assert "0 nothing has drifted" in " ".join(told.replace("\u2502", " ").split())


def test_why_says_the_rules_and_shows_the_picture_beside_its_keeper(project: Path) -> None:
    table = manifest([7.5, 7.4, 6.0]).assign(
        width=[5000, 4000, 4000], pdq_hash=["0" * 64, "0" * 63 + "3", "f" * 64], pdq_quality=100
    )
    rules = load_settings(ROOT / "params.yaml").select
    selected = select(table, rules)
    write_table(selected, project / "data" / "select" / "manifest.parquet")
    later = selected.assign(caption_status="ok", split=["train", None, None])
    for stage in ("caption", "slices"):
        (project / "data" / stage).mkdir()
        write_table(later, project / "data" / stage / "manifest.parquet")
    page = project / "why.html"
    done = CliRunner().invoke(app, ["corpus", "why", "1.jpg", "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert "dropped by near_duplicate" in done.output
    assert "2 of 256 bits" in done.output
    assert "kept in its place: 0.jpg" in done.output
    assert "0.jpg" in page.read_text()
    kept = CliRunner().invoke(app, ["corpus", "why", "0.jpg"])
    assert "slices: split train" in kept.output
    for wrong in (["x.jpg"], ["0000"], ["1.jpg", "--out", "why.gif"]):
        done = CliRunner().invoke(app, ["corpus", "why", *wrong])
        assert done.exit_code == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
