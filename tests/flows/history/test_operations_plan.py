"""What the next run would compute, why, and how long it took before."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from components.corpus.manifest import write_table
from components.telemetry.wording import time_text
from flows.cli import app
from flows.history.operations_plan import (
    OperationsPlan,
    StageForecast,
    duration,
    operations_summary,
    operations_table,
    plan_operations,
)
from flows.history.run_evidence import StageRun, finished_runs
from flows.records.records import RunDescription, RunResult, open_record
from flows.tracking.uploader import Uploader
from flows.versioning import graph as versioning


def repro(root: Path, *arguments: str) -> None:
    subprocess.run(["dvc", "repro", "-q", *arguments], cwd=root, check=True)


@pytest.fixture
def project(toy: Path, root: Path) -> Path:
    """The toy with valid settings."""
    settings = (root / "params.yaml").read_text(encoding="utf-8")
    (toy / "params.yaml").write_text(settings, encoding="utf-8")
    graph = (toy / "dvc.yaml").read_text().replace("params: [value]", "params: [project.seed]")
    (toy / "dvc.yaml").write_text(graph.replace("cp params.yaml data/a", "echo a > data/a"))
    return toy


def ran(root: Path, stage: str, seconds: float, params: dict[str, object]) -> None:
    """A finished run as a stage leaves it."""
    run = RunDescription(kind="stage", name=stage, params=params, started_ms=1_000)
    ended_ms = 1_000 + int(seconds * 1000)
    open_record(root, run).finish(RunResult(status="FINISHED", ended_ms=ended_ms))


def test_actions_follow_dvc_and_nothing_is_changed(project: Path) -> None:
    def actions() -> dict[str, str]:
        made = plan_operations(project, mlflow=False)
        return {one.stage: one.action for one in made.stages}

    assert actions() == dict.fromkeys("abcd", "run")
    repro(project)
    assert actions() == dict.fromkeys("abcd", "nothing")
    lock = (project / "dvc.lock").read_bytes()
    (project / "source").write_text("other photographs\n")
    changed = plan_operations(project, mlflow=False)
    assert {one.stage: one.action for one in changed.stages} == {
        # b is below a only, c reads the source itself.
        "a": "run",
        "b": "may run",
        "c": "run",
        "d": "may run",
    }
    reasons = {one.stage: one.reason for one in changed.stages}
    assert reasons["a"] == "changed deps: source (modified)"
    assert reasons["b"] == "after a"
    assert (project / "dvc.lock").read_bytes() == lock
    repro(project)
    (project / "source").write_text("photographs\n")
    assert actions()["a"] == "restore"


def test_a_stage_whose_outputs_persist_is_run_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = project / "dvc.yaml"
    # As the listing of photographs: the stage reads what it wrote before.
    graph.write_text(graph.read_text().replace("outs: [data/a]", "outs: [data/a: {persist: true}]"))
    repro(project)
    (project / "source").write_text("one photograph more\n")
    monkeypatch.chdir(project)
    for typed in (["plan"], ["stage", "plan"]):
        done = CliRunner().invoke(app, typed)
        assert done.exit_code == 0, (done.output, done.exception)
        assert "source (modified)" in done.output


def test_times_are_medians_of_the_same_settings_first_then_of_others(project: Path) -> None:
    seed = {"project.seed": 20260721}
    node = versioning.stage_graph(project)["a"]
    assert duration(node, [], seed) == (0.1 / 60, "estimate")
    ran(project, "a", 900, {"project.seed": 1})
    runs = finished_runs(project, {}, None)
    assert duration(node, runs, seed) == (0.25, "1 run, other settings")
    for seconds in (10, 20, 36_000):
        ran(project, "a", seconds, dict(seed))
    runs = finished_runs(project, {}, None)
    assert duration(node, runs, seed) == (20 / 3600, "3 runs, same settings")


def test_the_time_between_two_attempts_is_no_time_of_a_run(project: Path) -> None:
    for stage, attempts in (("a", 2), ("b", 1)):
        for _ in range(attempts):
            described = RunDescription(kind="stage", name=stage, stage_key="k", started_ms=1_000)
            record = open_record(project, described)
        record.finish(RunResult(status="FINISHED", ended_ms=6_000))
    known = {run.stage: run.seconds for run in finished_runs(project, {}, None)}
    assert known == {"a": None, "b": 5.0}


def test_the_newest_runs_count_and_those_of_a_former_machine_do_not(project: Path) -> None:
    node, params = versioning.stage_graph(project)["a"], {"value": 1}
    times = [*[100.0] * 30, *[10.0] * 20]
    runs = [StageRun("a", "record", params=params, seconds=seconds) for seconds in times]
    assert duration(node, runs, params) == (10 / 3600, "20 runs, same settings")
    assert duration(node, runs, {"value": 2}) == (10 / 3600, "20 runs, other settings")


@pytest.mark.slow
def test_a_run_that_was_interrupted_does_not_count(project: Path) -> None:
    run = RunDescription(kind="stage", name="a", stage_key="k", started_ms=1_000)
    open_record(project, run)
    again = open_record(project, run)
    assert again.run.attempts == 2
    again.finish(RunResult(status="FINISHED"))
    uploader = Uploader(project)
    uploader.sync()
    assert [found.seconds for found in finished_runs(project, {}, None)] == [None]
    again.folder.rename(project / "elsewhere")
    ran(project, "b", 5, {"project.seed": 1})
    uploader.sync()
    (project / "runs" / "records").rename(project / "records-elsewhere")
    # The same is read from MLflow, where the records are of another clone.
    known = {run.stage: run for run in finished_runs(project, {}, uploader.client)}
    assert {stage: run.seconds for stage, run in known.items()} == {"a": None, "b": 5.0}
    node = versioning.stage_graph(project)["b"]
    assert duration(node, list(known.values()), {"project.seed": 1})[1] == "1 run, same settings"


def test_gpu_hours_and_cost_are_hours_times_gpus_times_price() -> None:
    stages = (
        StageForecast("a", "run", "never run", 2.0, "estimate", 0),
        StageForecast("b", "may run", "after a", 3.0, "1 run, same settings", 8),
    )
    made = OperationsPlan(stages, elapsed_hours=5.0)
    assert (made.hours, made.gpu_hours) == (5.0, 24.0)
    assert made.as_dict(2.5)["cost"] == 60.0
    assert made.as_dict(None)["stages"][1]["cost"] is None
    assert [time_text(hours) for hours in (0.01, 0.5, 12)] == ["36 s", "30.0 min", "12.0 h"]


def test_memory_follows_from_the_number_of_candidates(project: Path) -> None:
    graph = (project / "dvc.yaml").read_text().replace("mem_gb: 0.1", "mem_gb: 0.5", 1)
    graph = graph.replace("mem_gb: 0.5", "mem_gb: 0.5, mem_gb_per_million: 1000")
    (project / "dvc.yaml").write_text(graph.replace("million: 1000", "million: 1000.0"))
    first = plan_operations(project, mlflow=False).stages[0]
    # Nothing was ingested yet.
    assert first.memory_gb == 0.5
    rows = pd.DataFrame({"image_id": [f"{n:064x}" for n in range(2000)]})
    table = rows.assign(uri=rows["image_id"])
    write_table(table, project / "data" / "ingest" / "manifest.parquet")
    made = plan_operations(project, mlflow=False)
    assert made.stages[0].memory_gb == pytest.approx(2.5)
    assert made.as_dict(None)["stages"][0]["memory_gb"] == 2.5
    assert "2.5 GiB" in str(list(operations_table(made, None).columns[3].cells))


def test_elapsed_time_follows_the_slowest_path(project: Path) -> None:
    for stage, seconds in {"a": 3600, "b": 7200, "c": 3600, "d": 3600}.items():
        ran(project, stage, seconds, {"project.seed": 20260721} if stage == "a" else {})
    made = plan_operations(project, mlflow=False)
    assert (made.hours, made.elapsed_hours) == (5.0, 4.0)


def test_the_price_is_that_of_the_settings_unless_another_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    settings["runtime"]["gpu_hour_price"] = 2.5
    (project / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    graph = (project / "dvc.yaml").read_text().replace("gpus: 0", "gpus: 2")
    (project / "dvc.yaml").write_text(graph)
    monkeypatch.chdir(project)
    command = ["stage", "plan", "--no-mlflow", "--json"]
    for more, price in (([], 2.5), (["--price-per-gpu-hour", "4"], 4.0)):
        found = json.loads(CliRunner().invoke(app, [*command, *more]).stdout)
        # est_minutes of every toy stage is 0.1.
        assert found["gpu_hours"] == pytest.approx(4 * 2 * 0.1 / 60)
        assert found["cost"] == pytest.approx(found["gpu_hours"] * price)


def test_both_commands_show_it_and_refuse_bad_prices(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    run = CliRunner().invoke
    shown = run(app, ["stage", "plan", "--no-mlflow", "--json", "--price-per-gpu-hour", "2"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert [row["stage"] for row in found["stages"]] == ["a", "b", "c", "d"]
    assert found["cost"] == 0
    table = run(app, ["stage", "plan", "--no-mlflow"], env={"COLUMNS": "160"}).stdout
    assert "never run" in table
    assert "4 run: at most" in table
    whole = json.loads(run(app, ["plan", "--json"]).stdout)
    assert whole["next_run"]["stages"][0]["reason"] == "never run"
    assert "next_run" not in json.loads(
        run(app, ["plan", "--settings", "params.yaml", "--json"]).stdout
    )
    refused = run(app, ["stage", "plan", "--price-per-gpu-hour", "-1"])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("profile", "basis", "is_said"),
    [
        ("embedded", "estimate", False),
        ("paper", "estimate", True),
        ("paper", "2 runs, same settings", False),
    ],
)
def test_estimates_of_another_profile_are_called_what_they_are(
    profile: str, basis: str, is_said: bool
) -> None:
    stages = (StageForecast("a", "run", "never run", 2.0, basis, 0),)
    said = operations_summary(OperationsPlan(stages, 2.0, profile=profile), None)
    assert said.startswith("1 run: at most 2.0 h of stages, 2.0 h along")
    assert (f"profile embedded and say nothing of {profile}" in said) is is_said
