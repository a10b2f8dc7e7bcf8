"""A warning ahead of a kill costs at most one step, and the result stays the same to the byte."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import newest_checkpoint
from components.training.distributed.interruption import TrainingInterrupted
from components.training.dit.job import DitJob
from components.training.dit.worker import run_job

pytestmark = pytest.mark.usefixtures("training_environment_restored")


def exported(job: DitJob) -> dict[str, bytes]:
    files = (path for path in sorted(job.export_dir.rglob("*")) if path.is_file())
    return {str(path.relative_to(job.export_dir)): path.read_bytes() for path in files}


def warned_at(job: DitJob, step: int, number: signal.Signals, patch: pytest.MonkeyPatch) -> int:
    """Run the job, warned by a signal while a step is logged; the step that was saved."""
    log = MetricLog.log

    def logged(self: MetricLog, metrics: Any, at: int) -> None:
        log(self, metrics, at)
        if at == step:
            os.kill(os.getpid(), number)

    with patch.context() as patched:
        patched.setattr(MetricLog, "log", logged)
        with pytest.raises(TrainingInterrupted, match=f"saved at step {step} of"):
            run_job(job)
    newest = newest_checkpoint(job.state_dir / "checkpoints")
    assert newest is not None
    return newest[0]


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1]
)
def test_a_warned_run_saves_the_step_it_is_at(
    make_dit_job: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    steps = {"steps": 5, "checkpoint_every": 5, "validate_every": 5}
    job = make_dit_job(tmp_path / "warned", **steps)
    assert warned_at(job, 3, number, monkeypatch) == 3
    whole = make_dit_job(tmp_path / "whole", **steps)
    run_job(whole)
    run_job(job)
    assert exported(job) == exported(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_are_warned_by_their_launcher(
    make_dit_job: Callable[..., Any], tmp_path: Path, number: signal.Signals
) -> None:
    steps = {"steps": 30, "checkpoint_every": 30, "validate_every": 30, "processes": 2}
    job = make_dit_job(tmp_path / "warned", **steps)

    def warn() -> None:
        while not (job.metrics.exists() and len(list(MetricLog(job.metrics).rows())) > 3):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=warn, daemon=True)
    thread.start()
    with pytest.raises(TrainingInterrupted, match="run it again"):
        run_job(job)
    thread.join()
    newest = newest_checkpoint(job.state_dir / "checkpoints")
    assert newest is not None
    # Nothing that was logged has to be made again.
    assert newest[0] == max(int(row["step"]) for row in MetricLog(job.metrics).rows()) < 30
    whole = make_dit_job(tmp_path / "whole", **steps)
    run_job(whole)
    run_job(job)
    assert exported(job) == exported(whole)


def test_a_checkpoint_is_also_due_by_the_clock(make_dit_job, tmp_path: Path) -> None:
    job = make_dit_job(
        tmp_path, steps=6, checkpoint_every=100, checkpoint_every_minutes=1e-6, keep_checkpoints=9
    )
    run_job(job)
    assert len(list((job.state_dir / "checkpoints").glob("step-*"))) == 6
    stalls = [row for row in MetricLog(job.metrics).rows() if "checkpoint_stall_s" in row]
    assert [row["step"] for row in stalls] == [2, 3, 4, 5, 6]
