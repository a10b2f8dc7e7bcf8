"""The contracts' table on a run's Prefect page, over real records and a real MLflow store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flows.pools.contract_artifact import contracts_table
from flows.pools.pipeline_artifacts import stage_records
from flows.records.records import Record, RunDescription, RunResult, Status, open_record
from flows.running.stage_runner import StageOutcome
from flows.tracking.uploader import Uploader


def test_the_contracts_of_a_run_are_a_table_that_links_to_their_pages(
    toy: Path, give_store: Callable[[Path], None]
) -> None:
    give_store(toy)
    pipeline = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))

    def checked(stage: str, prefix: str, passed: int, critical: int) -> Record:
        described = RunDescription(kind="stage", name=stage, parent=pipeline.record_id)
        record = open_record(toy, described)
        counts = {"expectations": 9, "passed": passed, "skipped": 1}
        counts |= {"critical_failures": critical, "warning_failures": 8 - passed - critical}
        metrics = {f"{prefix}{key}": float(value) for key, value in counts.items()}
        files = [
            f"data/{stage}/{prefix}{name}"
            for name in ("results.json", "report.html", "failed_rows.parquet")
        ]
        status: Status = "FAILED" if critical else "FINISHED"
        record.finish(RunResult(status=status, metrics=metrics, artifacts=files))
        return record

    record = checked("ingest", "contract_", passed=7, critical=0)
    checked("select", "contract_", passed=8, critical=0)
    # Another run's failed contract is not this run's.
    other = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    pipeline, this = other, pipeline
    checked("validate", "", passed=2, critical=3)
    outcomes = {
        "ingest": StageOutcome("ingest", "ran"),
        "signals": StageOutcome("signals", "ran"),
        "select": StageOutcome("select", "skipped"),
        "validate": StageOutcome("validate", "refused"),
    }
    files = contracts_table(stage_records(toy, this, outcomes), "http://mlflow")
    assert files is not None
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in files.splitlines()[2:]]
    page = "`data/ingest/contract_report.html`"
    violating = "`data/ingest/contract_failed_rows.parquet`"
    assert rows[0] == ["ingest", "warned", "7 of 9, 1 skipped", "0", "1", page, violating]
    assert [row[:2] for row in rows] == [["ingest", "warned"], ["select", "held"]]
    uploader = Uploader(toy)
    uploader.sync()
    linked = contracts_table(stage_records(toy, other, outcomes), "http://mlflow")
    assert linked is not None
    assert "| validate | **stopped** | 2 of 9, 1 skipped | 3 | 3 |" in linked
    run = f"http://mlflow/#/experiments/{uploader.experiment_id}/runs/{record.mlflow_run_id}"
    assert f"[contract_report.html]({run}/artifactPath/contract_report.html)" in linked
    assert contracts_table({}, None) is None
