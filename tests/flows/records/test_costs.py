"""GPU-hours and cost: arithmetic, rows of the stages table, the stage's own metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from components.settings.schema import load_settings
from flows.pools.pipeline_artifacts import stage_rows
from flows.records.costs import gpu_hours, pipeline_cost, with_cost
from flows.records.records import RunResult
from flows.running.dvc_repro import DvcRunner
from flows.running.stage_runner import StageOutcome
from flows.versioning.graph import stage_graph


def test_eight_gpus_for_an_hour_and_a_half_are_twelve_gpu_hours() -> None:
    assert gpu_hours(5400, 8) == 12
    assert pipeline_cost({"a": 5400, "b": 3600, "c": 99}, {"a": 8, "b": 1, "c": 0}, 2.5) == {
        "gpu_hours": 13,
        "cost": 32.5,
    }
    assert pipeline_cost({"a": 3600}, {"a": 1}, None) == {"gpu_hours": 1}


def test_a_stage_without_gpus_has_no_cost_metrics(root: Path) -> None:
    runtime = load_settings(root / "params.yaml").runtime
    priced = runtime.model_copy(update={"gpu_hour_price": 3.0})
    result = RunResult(status="FINISHED", metrics={"loss": 1.0})
    assert with_cost(result, 100, 0, priced) is result
    assert with_cost(result, 1800, 2, priced).metrics == {"loss": 1.0, "gpu_hours": 1, "cost": 3}


def test_the_table_has_a_row_per_stage_and_their_sum(toy: Path) -> None:
    graph = stage_graph(toy)
    graph["b"] = replace(graph["b"], meta=graph["b"].meta.model_copy(update={"gpus": 2}))
    runner = DvcRunner(toy, graph, parent_record=None, stale={})
    outcomes = {
        "b": StageOutcome("b", "ran", 1800.0, "trained"),
        "a": StageOutcome("a", "skipped", 0.0, "unchanged"),
    }
    rows = stage_rows(runner, outcomes, 4.0)
    assert [row["stage"] for row in rows] == ["a", "b", "total"]
    assert [row["gpu_hours"] for row in rows] == [0, 1, 1]
    assert [row["cost"] for row in rows] == [0, 4, 4]
    assert rows[-1]["seconds"] == 1800
    assert "cost" not in stage_rows(runner, outcomes, None)[0]
