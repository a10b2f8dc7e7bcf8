"""Where optimizer states live changes nothing; accumulation in float32."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from components.telemetry.metric_log import MetricLog
from components.training.dit.worker import run_job

pytestmark = pytest.mark.usefixtures("training_environment_restored")


def raw_weights(job):
    return load_file(job.export_dir / "raw" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_states_in_host_memory_train_the_same_weights(make_dit_job, tmp_path, stage):
    here, offloaded = (
        make_dit_job(tmp_path / place, steps=2, zero_stage=stage, offload_optimizer=place)
        for place in ("none", "cpu")
    )
    run_job(here)
    run_job(offloaded)
    ours, theirs = raw_weights(here), raw_weights(offloaded)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_moments_in_8_bits_train_and_resume_with_the_same_bytes(make_dit_job, tmp_path):
    whole = make_dit_job(tmp_path / "whole", optimizer="adamw_8bit")
    run_job(whole)
    run_job(make_dit_job(tmp_path / "parts", optimizer="adamw_8bit", steps=2))
    parts = make_dit_job(tmp_path / "parts", optimizer="adamw_8bit")
    run_job(parts)
    resumed = raw_weights(parts)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in raw_weights(whole).items())


@pytest.mark.slow
def test_four_micro_batches_accumulate_the_gradient_of_one_batch(make_dit_job, tmp_path):
    """In bf16 the batch's own rounding remains; sums in bf16 would lose 8 bits of each part."""
    norms = []
    for micro in (4, 1):
        job = make_dit_job(tmp_path / str(micro), steps=1, micro_batch_size=micro)
        run_job(job)

        norms.append(
            [row["grad_norm"] for row in MetricLog(job.metrics).rows() if "grad_norm" in row]
        )
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)
