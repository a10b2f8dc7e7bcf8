"""The real stages in other clones: the whole pipeline with a kill, and MLflow's record of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.records.records import RunDescription, all_records, open_record
from flows.remote import data_remote
from flows.remote.remote_stage import code_commit, run_remote_stage
from flows.remote.stage_messages import StageRequest, keep_files
from flows.tracking.sync import sync_once


@pytest.mark.slow
@pytest.mark.parametrize("remote", ["folder", "s3"])
def test_two_clones_with_workers_of_which_one_loses_a_stage_make_the_bytes_of_one_clone(
    root: Path, remote: str
) -> None:
    """The script ends with an error where any output differs."""
    done = subprocess.run(
        [sys.executable, "benchmarks/two_machines.py", "--remote", remote],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9" in done.stdout
    assert "sent to the pool again" in done.stdout
    killed = re.search(r"(worker-\w)\$ kill -9", done.stdout)
    ended = re.search(r"done +vae .*", done.stdout)
    assert killed is not None
    assert ended is not None
    # Whichever worker is free takes it: the other one goes on from the copy of the state.
    if killed[1] not in ended[0]:
        assert re.search(r"from step-\d+ of another clone", ended[0])
    assert "every file the same bytes" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("server", [True, False])
def test_the_run_of_a_remote_stage_hangs_under_the_pipelines_run_once(
    clone: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: bool
) -> None:
    from mlflow import MlflowClient

    pipeline = clone(f"pipeline-{server}", {}, ["ng-32703.jpg", "jad-limcaco-square.jpg"])
    worker = tmp_path / "worker"
    subprocess.run(["git", "clone", "-q", str(pipeline), str(worker)], check=True)
    (tmp_path / "share").mkdir()
    monkeypatch.setenv(data_remote.REMOTE, str(tmp_path / "share"))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    record = open_record(pipeline, RunDescription(kind="pipeline", name="pipeline"))
    sync_once(pipeline)
    if not server:
        # The worker cannot reach MLflow: what it recorded comes back with the reply.
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    lock: dict[str, Any] = {}
    # `source` has no artifacts; `ingest` stands on it.
    for name in ("source", "ingest"):
        request = StageRequest(
            name,
            code_commit(pipeline),
            (pipeline / "params.yaml").read_text(),
            lock=lock,
            parent=record.record_id,
            parent_run=record.mlflow_run_id,
        )
        reply = run_remote_stage(request, root=worker)
        assert reply.status == "ran", reply.message
        lock = lock | {name: reply.entry}
    assert reply.entry is not None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    keep_files(pipeline, reply.files)
    sync_once(pipeline)
    (stage,) = [one for one in all_records(pipeline) if one.run.name == "ingest"]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ultraflux")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (child,) = [run for run in runs if run.info.run_name == "ingest"]
    assert child.info.run_id == stage.mlflow_run_id
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == record.mlflow_run_id
    for out in reply.entry["outs"]:
        assert child.data.tags[f"dvc.out.{out['path']}"] == out["md5"]
    # Artifacts of a worker that sent them itself are there, too.
    assert bool(client.list_artifacts(child.info.run_id)) == server
