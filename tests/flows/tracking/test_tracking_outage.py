"""A real MLflow server that is killed and comes back during a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from components.telemetry.metric_log import MetricLog
from flows.records.records import Record, RunDescription, RunResult, open_record
from flows.services import servers as services

PATIENCE_S = 120.0


def start_server(root: Path, port: int) -> subprocess.Popen[bytes]:
    (root / "runs").mkdir(exist_ok=True)
    with (root / "runs" / "server.log").open("ab") as log:
        process = subprocess.Popen(
            services.mlflow_command(root, port),
            cwd=root,
            env=os.environ | services.mlflow_environment(root),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}/health"
    services.wait_until_healthy("mlflow", url, None, root / "runs" / "server.log")
    return process


def kill_server(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, 9)
    process.wait()


def wait_for(record: Record, what: str, size: int) -> None:
    """Until the uploader has noted `size` items."""
    from flows.records.records import read_json

    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        state = read_json(record.folder / "mlflow.json") or {}
        done = state.get("sent", {}).get("loss", 0) if what == "loss" else len(state.get(what, []))
        if done >= size:
            return
        time.sleep(0.1)
    pytest.fail(f"{what} did not reach {size}")


@pytest.mark.slow
def test_metrics_arrive_live_and_once_though_the_server_dies_during_the_run(
    toy: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = services.free_port()
    server = start_server(toy, port)
    login = services.mlflow_environment(toy)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", login["MLFLOW_AUTH_ADMIN_USERNAME"])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", login["MLFLOW_AUTH_ADMIN_PASSWORD"])
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    record = open_record(
        toy,
        RunDescription(
            kind="stage",
            name="dit_stage1",
            stage_key="k",
            metrics_file="runs/metrics.jsonl",
            images_dir="runs/samples",
        ),
    )
    log, samples = MetricLog(toy / "runs" / "metrics.jsonl"), toy / "runs" / "samples"
    samples.mkdir()
    uploader = subprocess.Popen(
        [sys.executable, "-m", "flows.tracking.uploader", str(toy)],
        cwd=root,
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for step in range(1, 31):
            log.log({"loss": 1 / step, "step_s": 0.1}, step)
        Image.new("RGB", (8, 8), "red").save(samples / "step-00000020.png")
        wait_for(record, "loss", 30)  # while the run goes on
        wait_for(record, "images", 1)
        kill_server(server)
        for step in range(31, 61):
            log.log({"loss": 1 / step, "step_s": 0.1}, step)
        # The training process was killed too and goes on from step 25.
        log.rewind(25)
        for step in range(26, 91):
            judged = {"validation_loss": 1 / step} if step % 30 == 0 else {}
            log.log({"loss": 1 / step, "step_s": 0.2} | judged, step)
        Image.new("RGB", (8, 8), "blue").save(samples / "step-00000040.png")
        time.sleep(3)
        server = start_server(toy, port)
        wait_for(record, "loss", 90)
        record.finish(RunResult(status="FINISHED"))
        _, said = uploader.communicate(timeout=PATIENCE_S)
    finally:
        uploader.kill()
        uploader.wait()
    assert uploader.returncode == 0
    assert said.count("retrying") == said.count("connected again") == 1
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
    try:
        run_id = str(record.mlflow_run_id)
        for key in ("loss", "step_s"):
            history = client.get_metric_history(run_id, key)
            assert sorted(point.step for point in history) == list(range(1, 91)), key
        pictures = [Path(item.path).name for item in client.list_artifacts(run_id, "images")]
        whole = sorted(name for name in pictures if name.endswith(".png"))
        assert [name.split("+")[:3] for name in whole] == [
            ["samples", "step", "20"],
            ["samples", "step", "40"],
        ]
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        models = client.search_logged_models(
            [run.info.experiment_id],
            order_by=[{"field_name": "metrics.validation_loss", "ascending": True}],
        )
        assert [model.params["step"] for model in models] == ["90", "60", "30"]
        assert {str(model.status) for model in models} == {"READY"}
    finally:
        kill_server(server)
