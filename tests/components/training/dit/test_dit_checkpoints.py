"""Checkpoints of the trainer itself: what is in them, and who can go on from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from components.telemetry.metric_log import MetricLog
from components.training.dit.job import DitJob
from components.training.dit.worker import run_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("training_environment_restored")]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def losses(job: DitJob) -> list[float]:
    return MetricLog(job.metrics).series("loss")[1]


def test_checkpoints_written_beside_training_have_the_bytes_of_those_that_stop_it(
    make_dit_job, tmp_path
):
    stopping = make_dit_job(tmp_path / "stopping", async_checkpoints=False)
    beside = make_dit_job(tmp_path / "beside", async_checkpoints=True)
    for job in (stopping, beside):
        run_job(job)
    expected = hashes(stopping.state_dir / "checkpoints")
    assert hashes(beside.state_dir / "checkpoints") == expected
    # The card names the settings, which differ.
    exports = [
        {name: found for name, found in hashes(job.export_dir).items() if "README" not in name}
        for job in (stopping, beside)
    ]
    assert exports[0] == exports[1]
    assert sum(name.endswith("optim_states.pt") for name in expected) == 2


@pytest.mark.parametrize(
    ("before", "after", "stage", "precision"),
    [(2, 1, 2, "bf16"), (1, 2, 1, "bf16"), (2, 1, 1, "fp32"), (1, 2, 0, "fp32")],
)
def test_another_number_of_processes_goes_on_from_the_same_weights(
    make_dit_job, tmp_path, before, after, stage, precision
):
    options = {"zero_stage": stage, "precision": precision}
    whole = make_dit_job(tmp_path / "whole", processes=before, **options)
    changed = tmp_path / "changed"
    run_job(whole)
    first = make_dit_job(changed, processes=before, steps=2, **options)
    run_job(first)
    saved = hashes(first.export_dir)
    # Nothing is left to train: loaded, and exported again.
    run_job(make_dit_job(changed, processes=after, steps=2, **options))
    assert hashes(first.export_dir) == saved
    last = make_dit_job(changed, processes=after, **options)
    run_job(last)
    assert losses(last)[:2] == losses(whole)[:2]
    tolerance = 2e-2 if precision == "bf16" else 2e-3
    assert losses(last) == pytest.approx(losses(whole), rel=tolerance)
