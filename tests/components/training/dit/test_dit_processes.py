"""Training processes as they are run: killed with SIGKILL, and two at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import newest_checkpoint
from components.training.dit.job import DitJob, build_transformer
from components.training.dit.throughput import MACHINE_METRICS
from components.training.dit.worker import run_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("training_environment_restored")]
PATIENCE_S = 240.0
TEXT_WIDTH = 16


def start(job: DitJob) -> subprocess.Popen[bytes]:
    job.state_dir.mkdir(parents=True, exist_ok=True)
    path = job.state_dir / "job.json"
    path.write_text(job.model_dump_json())
    command = [sys.executable, "-m", "components.training.dit.worker", str(path)]
    root = Path(__file__).resolve().parents[4]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.PIPE)


def finish(job: DitJob) -> None:
    process = start(job)
    assert process.wait(PATIENCE_S) == 0


def kill_after(job: DitJob, steps: int) -> None:
    """Start the job and kill it once `steps` steps are logged and a checkpoint is whole."""
    process = start(job)
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        logged = len(MetricLog(job.metrics).series("loss")[0]) if job.metrics.exists() else 0
        # It is written beside the steps, and on a busy disk long after its own.
        if logged >= steps and newest_checkpoint(job.state_dir / "checkpoints") is not None:
            break
        time.sleep(0.02)
    assert process.poll() is None, "the job ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def rows(job: DitJob) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name not in MACHINE_METRICS}
        for row in MetricLog(job.metrics).rows()
    ]


def weights(job: DitJob) -> dict[str, bytes]:
    return {
        str(path.relative_to(job.export_dir)): path.read_bytes()
        for path in sorted(job.export_dir.rglob("*.safetensors"))
    }


def ends_as_undisturbed(killed: DitJob, whole: DitJob, kill_at: int) -> None:
    """Run both jobs, one of them killed at a step; weights and curves are the same."""
    run_job(whole)
    kill_after(killed, steps=kill_at)
    done = newest_checkpoint(killed.state_dir / "checkpoints")
    assert done is not None
    assert killed.settings.checkpoint_every <= done[0] < killed.settings.steps
    finish(killed)
    assert weights(killed) == weights(whole)
    assert rows(killed) == rows(whole)


def test_killed_and_resumed_training_equals_undisturbed_training_byte_for_byte(
    make_dit_job, tmp_path
):
    options = {"steps": 60, "checkpoint_every": 10, "validate_every": 20}
    whole = make_dit_job(tmp_path / "whole", **options)
    killed = make_dit_job(tmp_path / "killed", **options)
    ends_as_undisturbed(killed, whole, kill_at=15)
    assert len(weights(whole)) == 2


@pytest.mark.parametrize(("kind", "waits"), [("int8", True), ("nf4", False)])
def test_an_adapter_on_a_rounded_base_is_killed_and_ends_with_the_same_bytes(
    make_dit_job, tmp_path, kind, waits
):
    """Also where the base's blocks wait on the host."""
    base = build_transformer(make_dit_job(tmp_path / "any"), (TEXT_WIDTH, TEXT_WIDTH), 16)
    generator = torch.Generator().manual_seed(3)
    for parameter in base.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    base.save_pretrained(tmp_path / "base")

    def adapted(folder):
        job = make_dit_job(
            tmp_path / folder,
            steps=30,
            checkpoint_every=5,
            validate_every=10,
            adapter={"rank": 2, "alpha": 2, "target_modules": ["to_q", "to_k"]},
            gradient_checkpointing="blocks",
            offload_base=waits,
        )
        transformer = job.transformer.model_copy(update={"quantisation": kind})
        return job.model_copy(
            update={"initial_weights": tmp_path / "base", "transformer": transformer}
        )

    whole, killed = adapted("whole"), adapted("killed")
    ends_as_undisturbed(killed, whole, kill_at=8)
    assert len(weights(whole)) == 4


def test_two_processes_follow_the_trajectory_of_one(make_dit_job, tmp_path):
    options = {"steps": 6, "precision": "fp32", "checkpoint_every": 3, "validate_every": 3}
    alone = make_dit_job(tmp_path / "alone", **options)
    pair = make_dit_job(tmp_path / "pair", processes=2, **options)
    run_job(alone)
    run_job(pair)
    # Before the first step the weights are equal, so validation must be: to the last bit.
    assert rows(alone)[0]["step"] == 0
    assert rows(alone)[0] == rows(pair)[0]
    assert "validation_loss_level_7" in rows(pair)[0]
    for one, two in zip(rows(alone), rows(pair), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name
