"""The same training whatever DeepSpeed ZeRO divides over the ranks."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from components.telemetry.metric_log import MetricLog
from components.training.dit.job import WEIGHTS_NAMES, DitJob
from components.training.dit.throughput import MACHINE_METRICS
from components.training.dit.worker import run_job

pytestmark = pytest.mark.usefixtures("training_environment_restored")


def rows(job: DitJob) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name not in MACHINE_METRICS}
        for row in MetricLog(job.metrics).rows()
    ]


def weights(job: DitJob, name: str) -> dict[str, torch.Tensor]:
    return load_file(job.export_dir / name / "diffusion_pytorch_model.safetensors")


def assert_same_losses(one: DitJob, other: DitJob, tolerance: float) -> None:
    for row, other_row in zip(rows(one), rows(other), strict=True):
        assert row.keys() == other_row.keys()
        for name, value in row.items():
            assert other_row[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name


def assert_same_training(one: DitJob, other: DitJob, tolerance: float) -> None:
    assert_same_losses(one, other, tolerance)
    for name in WEIGHTS_NAMES:
        ours, theirs = weights(one, name), weights(other, name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_stage_trains_the_same_weights(make_dit_job, tmp_path, stage):
    jobs = [
        make_dit_job(tmp_path / str(number), precision="fp32", zero_stage=number, steps=2)
        for number in (2, stage)
    ]
    for job in jobs:
        run_job(job)
    assert_same_training(*jobs, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_every_stage_trains_bfloat16_to_its_rounding(make_dit_job, tmp_path, stage):
    jobs = [make_dit_job(tmp_path / str(n), zero_stage=n, steps=2) for n in (2, stage)]
    for job in jobs:
        run_job(job)
    assert_same_losses(*jobs, tolerance=5e-3)


@pytest.mark.slow
def test_divided_weights_resume_with_the_same_bytes(make_dit_job, tmp_path):
    whole = make_dit_job(tmp_path / "whole", zero_stage=3)
    run_job(whole)
    run_job(make_dit_job(tmp_path / "parts", zero_stage=3, steps=2))
    parts = make_dit_job(tmp_path / "parts", zero_stage=3)
    run_job(parts)
    for name in WEIGHTS_NAMES:
        resumed = weights(parts, name)
        assert all(torch.equal(resumed[k], v) for k, v in weights(whole, name).items())


def test_bf16_without_masters_is_refused(make_dit_job, tmp_path):
    with pytest.raises(ValueError, match="zero_stage 0 keeps no float32 masters"):
        make_dit_job(tmp_path, zero_stage=0, precision="bf16")


@pytest.mark.slow
def test_two_processes_with_divided_weights_follow_two_with_whole_ones(make_dit_job, tmp_path):
    options = {"precision": "bf16", "steps": 4, "processes": 2}
    whole = make_dit_job(tmp_path / "whole", **options)
    run_job(whole)
    divided = make_dit_job(tmp_path / "divided", zero_stage=3, **options)
    run_job(divided)
    assert_same_training(whole, divided, 1e-5)

    expected = {name: weights(divided, name) for name in WEIGHTS_NAMES}
    shutil.rmtree(divided.export_dir)
    checkpoints = sorted((divided.state_dir / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    run_job(divided)
    for name in WEIGHTS_NAMES:
        resumed = weights(divided, name)
        assert all(torch.equal(resumed[key], tensor) for key, tensor in expected[name].items())
