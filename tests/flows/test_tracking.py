"""Run records reach a real MLflow store; nothing is lost when it is away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from PIL import Image

from flows.records import (
    Record,
    RunDescription,
    RunResult,
    close_interrupted,
    latest_finished,
    open_record,
)
from flows.registry import Promotion
from flows.tracking import Uploader


@pytest.fixture
def uploader(toy: Path) -> Uploader:
    return Uploader(toy)


def stage_record(root: Path, parent: Record | None, key: str = "k") -> Record:
    (root / "runs" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 1 / (step + 1)}) + "\n" for step in range(1200))
    )
    return open_record(
        root,
        RunDescription(
            kind="stage",
            name="vae",
            stage_key=key,
            parent=parent.record_id if parent else None,
            metrics_file="runs/metrics.jsonl",
            params={"vae.steps": 300},
            tags={"lock.sha256": "abc"},
        ),
    )


def test_a_record_becomes_a_child_run_with_metrics_artifacts_and_datasets(
    toy: Path, uploader: Uploader
) -> None:
    pipeline = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    record = stage_record(toy, pipeline)
    uploader.sync()
    run_id = record.mlflow_run_id
    assert run_id is not None
    assert uploader.client.get_run(run_id).info.status == "RUNNING"
    (toy / "data" / "note.txt").write_text("hello")
    pandas.DataFrame({"image_id": ["x"]}).to_parquet(toy / "data" / "m.parquet")
    record.finish(
        RunResult(
            status="FINISHED",
            metrics={"psnr_gain_db": 4.5},
            artifacts=["data/note.txt"],
            datasets={"corpus": "data/m.parquet"},
            tags={"weights.sha256": "w"},
            summary="fine",
        )
    )
    record.set_outputs({"data/vae": "0" * 32})
    pipeline.finish(RunResult(status="FINISHED"))
    uploader.sync()
    run = uploader.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == pipeline.mlflow_run_id
    assert run.data.tags["dvc.out.data/vae"] == "0" * 32
    assert run.data.params == {"vae.steps": "300"}
    assert run.data.metrics["psnr_gain_db"] == 4.5
    assert len(uploader.client.get_metric_history(run_id, "loss")) == 1200
    assert [item.path for item in uploader.client.list_artifacts(run_id)] == ["note.txt"]
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["corpus"]
    parent = uploader.client.get_run(str(pipeline.mlflow_run_id))
    assert parent.data.metrics["vae.psnr_gain_db"] == 4.5
    assert latest_finished(toy, "vae") == record


def test_sample_pictures_are_logged_by_step_and_once(toy: Path, uploader: Uploader) -> None:
    folder = toy / "runs" / "samples"
    folder.mkdir()
    run = RunDescription(kind="stage", name="dit_stage1", images_dir="runs/samples")
    record = open_record(toy, run)
    for step in (40, 80):
        Image.new("RGB", (8, 8), "red").save(folder / f"step-{step:08d}.png")
        uploader.sync()
        uploader.sync()
    listed = uploader.client.list_artifacts(str(record.mlflow_run_id), "images")
    names = sorted(Path(item.path).name for item in listed if item.path.endswith(".png"))
    assert [name.split("+")[:3] for name in names] == [
        ["samples", "step", "40"],
        ["samples", "step", "80"],
    ]


def test_an_unfinished_run_with_the_same_key_is_continued(toy: Path, uploader: Uploader) -> None:
    pipeline = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    first = stage_record(toy, pipeline)
    uploader.sync()
    close_interrupted(toy, pipeline.record_id)
    uploader.sync()
    run_id = str(first.mlflow_run_id)
    assert uploader.client.get_run(run_id).info.status == "KILLED"
    again = stage_record(toy, pipeline)
    assert again == first
    uploader.sync()
    assert uploader.client.get_run(run_id).info.status == "RUNNING"
    again.finish(RunResult(status="FINISHED"))
    uploader.sync()
    assert uploader.client.get_run(run_id).info.status == "FINISHED"
    assert stage_record(toy, pipeline) != first
    assert stage_record(toy, pipeline, key="other") != first


def test_promotion_sets_the_alias_once_and_is_idempotent(toy: Path, uploader: Uploader) -> None:
    record = stage_record(toy, None)
    promotion = {
        "model": "toy-vae",
        "path": "data/vae",
        "digest": "d" * 64,
        "alias": "candidate",
        "tags": {"gate.rule": "1 (needs 0)"},
    }
    record.finish(RunResult(status="FINISHED", promotions=[promotion]))
    uploader.sync()
    version = uploader.client.get_model_version_by_alias("toy-vae", "candidate")
    assert version.version == 1 or version.version == "1"
    assert version.tags["weights.sha256"] == "d" * 64
    from flows.registry import register

    again = register(
        uploader.client,
        uploader.experiment_id,
        None,
        Promotion(**promotion),  # type: ignore[arg-type]
    )
    assert str(again.version) == "1"
    refused = Promotion("toy-vae", "data/vae", "e" * 64, None)
    assert str(register(uploader.client, uploader.experiment_id, None, refused).version) == "2"
    version = uploader.client.get_model_version_by_alias("toy-vae", "candidate")
    assert str(version.version) == "1"


def test_with_the_server_away_the_uploader_says_so_once_and_loses_nothing(
    toy: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stage_record(toy, None)
    record.finish(RunResult(status="FINISHED"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = subprocess.run(
        [sys.executable, "-m", "flows.tracking", str(toy)],
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert "ultraflux sync" in done.stderr
    assert record.mlflow_run_id is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    uploader = Uploader(toy)
    uploader.sync()
    run = uploader.client.get_run(str(record.mlflow_run_id))
    assert run.info.status == "FINISHED"
    assert len(uploader.client.get_metric_history(run.info.run_id, "loss")) == 1200
