"""What somebody has deleted in MLflow is said with what brings it back; no record is to blame."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.commands.refusals import FAILED, refusal
from flows.records.records import Record, RunDescription, RunResult, open_record, unsent_records
from flows.tracking.store_problems import TrackingAway
from flows.tracking.uploader import Uploader

Typed = Callable[..., subprocess.CompletedProcess[str]]
EVERYTHING = "MLflow has everything\n"


@pytest.fixture
def uploader(toy: Path, give_store: Callable[[Path], None]) -> Uploader:
    give_store(toy)
    return Uploader(toy)


def begun(toy: Path, name: str, parent: Record | None = None) -> Record:
    above = None if parent is None else parent.record_id
    return open_record(toy, RunDescription(kind="stage", name=name, stage_key="k", parent=above))


def continued_after_deletion(toy: Path, uploader: Uploader) -> tuple[Record, str]:
    """A failed run that was deleted in MLflow and then went on to its end."""
    begun(toy, "vae").finish(RunResult(status="FAILED"))
    uploader.sync()
    again = begun(toy, "vae")
    run_id = str(again.mlflow_run_id)
    uploader.client.delete_run(run_id)
    again.finish(RunResult(status="FINISHED"))
    begun(toy, "dit").finish(RunResult(status="FINISHED"))
    return again, run_id


def test_a_deleted_run_that_goes_on_is_restored_or_sent_anew(
    toy: Path, uploader: Uploader, typed: Typed
) -> None:
    record, run_id = continued_after_deletion(toy, uploader)
    done = typed(toy, "sync")
    store = f"MLFLOW_TRACKING_URI={uploader.client.tracking_uri}"
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {record.record_id}: not sent whole: run {run_id} was deleted in MLflow: "
        f"`{store} mlflow runs restore --run-id {run_id}`, or remove "
        f"runs/records/{record.record_id}/mlflow.json to send it anew",
        "error: 1 records are not whole in MLflow; all others are",
    ]
    uploader.client.restore_run(run_id)
    assert typed(toy, "sync").stdout == EVERYTHING
    assert uploader.client.get_run(run_id).info.status == "FINISHED"


def test_a_run_that_is_gone_for_good_is_sent_anew(
    toy: Path, uploader: Uploader, typed: Typed
) -> None:
    record, run_id = continued_after_deletion(toy, uploader)
    # What `mlflow gc` does.
    uploader.client._tracking_client.store._hard_delete_run(run_id)
    note = f"runs/records/{record.record_id}/mlflow.json"
    said = f"run {run_id} was deleted in MLflow: remove {note} to send it anew"
    assert typed(toy, "sync").stderr.splitlines()[0].endswith(said)
    (toy / note).unlink()
    assert typed(toy, "sync").stdout == EVERYTHING
    assert uploader.client.get_run(str(record.mlflow_run_id)).info.status == "FINISHED"


def test_a_stage_whose_pipeline_was_deleted_says_so_of_the_pipeline(
    toy: Path, uploader: Uploader
) -> None:
    pipeline = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    stage = begun(toy, "vae", pipeline)
    uploader.sync()
    uploader.client.delete_run(str(pipeline.mlflow_run_id))
    stage.finish(RunResult(status="FINISHED", metrics={"loss": 1.0}))
    uploader.sync()
    assert f"runs/records/{pipeline.record_id}/mlflow.json" in uploader.faults[stage.record_id]


def test_a_deleted_experiment_is_no_fault_of_records(
    toy: Path, uploader: Uploader, typed: Typed
) -> None:
    record = begun(toy, "vae")
    uploader.sync()
    uploader.client.delete_experiment(uploader.experiment_id)
    record.finish(RunResult(status="FINISHED"))
    restore = f"mlflow experiments restore -x {uploader.experiment_id}`"
    # Beside a run, and at the next command.
    with pytest.raises(TrackingAway, match=restore):
        uploader.sync()
    for _ in range(2):
        with pytest.raises(
            TrackingAway, match=f"MLflow's experiment toy was deleted.*{restore}"
        ) as found:
            typed(toy, "sync")
        assert refusal(found.value, []) == (str(found.value), FAILED)
    assert unsent_records(toy) == {record.record_id}
    uploader.client.restore_experiment(uploader.experiment_id)
    assert typed(toy, "sync").stdout == EVERYTHING


def test_stages_that_wait_for_their_pipeline_are_counted(
    toy: Path, uploader: Uploader, typed: Typed
) -> None:
    refused = RunDescription(kind="pipeline", name="pipeline", params={"n" * 300: 1})
    pipeline = open_record(toy, refused)
    begun(toy, "vae", pipeline).finish(RunResult(status="FINISHED"))
    begun(toy, "dit").finish(RunResult(status="FINISHED"))
    said = typed(toy, "sync").stderr.splitlines()
    assert pipeline.record_id in said[0]
    assert said[1:] == ["error: 2 records are not whole in MLflow; all others are"]
