"""What differs between two runs, on a project with true-format records and locks."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from components.corpus.manifest import write_table
from flows.history.run_comparison import MetricChange, SideUnknown, compare, direction, find_side
from flows.history.run_evidence import Evidence
from flows.records.provenance import provenance_tags
from flows.records.records import RunDescription, RunResult, open_record
from flows.versioning import graph as versioning
from flows.versioning.lock_hashes import dep_hashes

MANIFEST = "data/select/manifest.parquet"


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def pipeline(root: Path, kept: list[bool], psnr_db: float, value: int) -> str:
    """One finished pipeline run of two stages, as the driver leaves it; its record id."""
    (root / "params.yaml").write_text(f"project: {{name: toy}}\nvalue: {value}\n")
    names = ["a", "b"]
    table = pd.DataFrame({"image_id": names, "uri": names, "kept": kept})
    path = root / MANIFEST
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, path)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    cached = versioning.cache_folder(root) / digest[:2] / digest[2:]
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(path.read_bytes())
    parent = open_record(
        root,
        RunDescription(
            kind="pipeline",
            name="pipeline",
            params={"project.name": "toy", "value": value},
            tags=provenance_tags(root),
        ),
    )
    lock: dict[str, Any] = {"schema": "2.0", "stages": {}}
    metrics: dict[str, dict[str, float]] = {
        "select": {"kept": float(sum(kept))},
        "evaluate": {"reconstruction_after_psnr_db": psnr_db, "photographs_psnr_db": 1.0},
    }
    outputs = {"select": {MANIFEST: digest}, "evaluate": {"data/evaluate/x": f"{psnr_db}"}}
    for stage, found in metrics.items():
        made = open_record(root, RunDescription(kind="stage", name=stage, parent=parent.record_id))
        made.finish(RunResult(status="FINISHED", metrics=found))
        made.set_outputs(outputs[stage])
        outs = [{"path": p, "md5": h} for p, h in outputs[stage].items()]
        lock["stages"][stage] = {"outs": outs}
    for folder in (root, parent.folder):
        (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    parent.finish(RunResult(status="FINISHED"))
    return parent.record_id


@pytest.fixture
def history(toy: Path) -> tuple[Path, str, str]:
    """Two pipeline runs at two commits; the second with an edited source and a lower PSNR."""
    first = pipeline(toy, [True, True], 30.0, 1)
    (toy / "source").write_text("other photographs\n")
    git(toy, "add", "source", "params.yaml", "dvc.lock")
    git(toy, "commit", "-qm", "more")
    return toy, first, pipeline(toy, [True, False], 29.0, 2)


def differences(root: Path, before: str, after: str) -> dict[str, Any]:
    evidence = Evidence(root, mlflow=False)
    return compare(evidence, find_side(evidence, before), find_side(evidence, after))


def test_two_runs_differ_in_code_data_settings_and_metrics_and_in_nothing_else(
    history: tuple[Path, str, str],
) -> None:
    found = differences(*history)
    assert found["settings"] == {"value": [1, 2]}
    assert MANIFEST in found["data"]
    assert found["corpus"]["kept"] == [2, 1]
    assert found["corpus"]["changes"]["newly_rejected"] == 1
    assert any("source" in line for line in found["code"]["stat"])
    psnr = found["metrics"]["evaluate.reconstruction_after_psnr_db"]
    assert psnr["difference"] == -1.0
    assert psnr["verdict"] == "worse"
    assert "evaluate.photographs_psnr_db" not in found["metrics"]
    assert found["metrics"]["select.kept"]["verdict"] == ""
    assert "settings.sha256" not in found["environment"]


def test_a_run_equals_itself_and_the_workspace_that_it_left(
    history: tuple[Path, str, str],
) -> None:
    root, _, second = history
    for other in (second, "workspace"):
        found = differences(root, second, other)
        assert found["code"]["equal"]
        assert found["corpus"] is None
        parts = ("data", "settings", "metrics", "environment", "packages")
        assert {part: found[part] for part in parts} == {part: {} for part in parts}


def test_a_revision_is_known_by_its_lock_and_its_settings(history: tuple[Path, str, str]) -> None:
    root, first, _ = history
    found = differences(root, "HEAD", "workspace")
    assert found["settings"] == {"value": [1, 2]}
    assert found["code"]["dirty"] == [False, True]
    assert found["metrics"]["evaluate.reconstruction_after_psnr_db"]["before"] == 30.0
    assert differences(root, first, "HEAD")["data"] == {}


def test_pipeline_is_the_newest_run_of_all_stages(history: tuple[Path, str, str]) -> None:
    root, _, second = history
    assert differences(root, "pipeline", "workspace")["runs"][0] == second


def test_hashes_that_nobody_wrote_down_are_unknown_and_not_equal(toy: Path) -> None:
    assert differences(toy, "HEAD", "workspace")["without_data"] == ["HEAD", "workspace"]
    command = ["ultraflux", "compare", "--no-mlflow", "HEAD", "workspace"]
    shown = subprocess.run(command, cwd=toy, capture_output=True, text=True).stdout
    assert "data: not known for HEAD and workspace" in shown
    assert "data: equal" not in shown


def test_an_unknown_name_is_one_line(toy: Path) -> None:
    with pytest.raises(SideUnknown, match="nor a git revision"):
        find_side(Evidence(toy, mlflow=False), "nothing")


def test_the_hash_of_changes_sees_edits_and_new_files_but_not_the_lock(toy: Path) -> None:
    clean = provenance_tags(toy)
    assert clean["git.dirty"] == "false"
    assert "git.diff_sha256" not in clean
    (toy / "dvc.lock").write_text("stages: {}\n")
    assert provenance_tags(toy)["git.dirty"] == "false"
    seen = set()
    for name in ("source", "new"):
        (toy / name).write_text("changed")
        seen.add(provenance_tags(toy)["git.diff_sha256"])
        (toy / name).write_text("changed again")
        seen.add(provenance_tags(toy)["git.diff_sha256"])
    assert len(seen) == 4


def test_the_inputs_in_a_record_are_those_of_the_lock(toy: Path) -> None:
    subprocess.run(["dvc", "repro", "-q", "b"], cwd=toy, check=True)
    entry = versioning.lock_entry(toy, "b")
    assert entry is not None
    assert versioning.stage_identity(toy, "b")[1] == dep_hashes(entry)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("evaluate.generated_compression_ratio", "lower"),
        ("evaluate.reconstruction_after_ms_ssim", "higher"),
        ("evaluate.photographs_glcm_score", ""),
        ("select.kept", ""),
    ],
)
def test_directions_come_from_the_cards(name: str, expected: str) -> None:
    assert direction(name) == expected
    assert MetricChange(name, 1.0, 2.0, "lower").verdict == "worse"
    assert MetricChange(name, None, 2.0, "lower").verdict == ""


def test_the_command_prints_tables_and_ends_with_one_where_something_differs(
    history: tuple[Path, str, str], typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    root, first, second = history

    def ultraflux(*arguments: str) -> subprocess.CompletedProcess[str]:
        return typed(root, "compare", "--no-mlflow", *arguments)

    shown = ultraflux(first, second)
    assert shown.returncode == 1, shown.stderr
    assert "settings: 1 differ" in shown.stdout
    assert "newly_rejected 1" in shown.stdout
    assert "worse" in shown.stdout
    assert ultraflux(second, "workspace").returncode == 0
    unknown = ultraflux("nothing", "workspace")
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1


def test_a_number_that_is_none_on_both_sides_differs_in_nothing(
    toy: Path, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    first = pipeline(toy, [True, True], math.nan, 1)
    done = typed(toy, "compare", "--no-mlflow", first, first, "--json")
    assert (done.returncode, json.loads(done.stdout)["metrics"]) == (0, {})
    second = pipeline(toy, [True, True], 30.0, 1)
    said = typed(toy, "compare", "--no-mlflow", first, second, "--json").stdout
    assert "NaN" not in said
    change = json.loads(said)["metrics"]["evaluate.reconstruction_after_psnr_db"]
    assert (change["before"], change["after"], change["difference"]) == (None, 30.0, None)


@pytest.mark.slow
def test_a_pipeline_record_keeps_its_settings_lock_and_uncommitted_changes(
    toy: Path, root: Path
) -> None:
    (toy / "params.yaml").write_text((root / "params.yaml").read_text())
    (toy / "data" / "sample").mkdir()
    graph = (toy / "dvc.yaml").read_text().replace("params: [value]", "params: [project.seed]")
    (toy / "dvc.yaml").write_text(graph.replace("  a:\n", "  ingest:\n"))
    done = subprocess.run(["ultraflux", "run"], cwd=toy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = next((toy / "runs" / "records").glob("pipeline-*"))
    assert (folder / "dvc.lock").read_bytes() == (toy / "dvc.lock").read_bytes()
    assert (folder / "params.yaml").read_bytes() == (toy / "params.yaml").read_bytes()
    assert "project.seed" in (folder / "changes.diff").read_text()
    assert differences(toy, folder.name, "workspace")["data"] == {}
