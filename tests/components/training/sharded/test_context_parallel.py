"""Tokens of each sample divided over processes: the same training, in parts."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from components.models.tiny import build_tiny_transformer
from components.telemetry.metric_log import MetricLog
from components.training.distributed.ranks import Ranks
from components.training.dit.job import WEIGHTS_NAMES
from components.training.dit.throughput import MACHINE_METRICS
from components.training.dit.worker import run_job
from components.training.sharded.context_parallel import (
    check_context_parallel,
    context_parallel_problem,
)
from components.training.sharded.engine import engine_configuration

TABLE = (
    (5440, 3072),
    (5184, 3264),
    (4992, 3328),
    (4736, 3520),
    (5824, 2880),
    (6272, 2688),
    (5568, 3008),
    (6336, 2624),
    (5632, 3008),
    (4608, 3648),
    (4096, 4096),
)


def rows(job):
    return [
        {name: value for name, value in row.items() if name not in MACHINE_METRICS}
        for row in MetricLog(job.metrics).rows()
    ]


def weights(job, name):
    return load_file(job.export_dir / name / "diffusion_pytorch_model.safetensors")


def test_degree_4_divides_every_published_bucket_and_degree_8_does_not():
    buckets = [(f"{h}x{w}", (h // 32) * (w // 32)) for h, w in TABLE]
    assert context_parallel_problem(4, 24, 512, buckets) is None
    problem = context_parallel_problem(8, 24, 512, buckets)
    assert problem is not None
    assert "bucket 5440x3072" not in problem
    assert problem.startswith("runtime.context_parallel_degree 8: bucket ")


@pytest.mark.parametrize(
    ("degree", "heads", "text", "named"),
    [(5, 24, 512, "24 attention heads"), (3, 24, 512, "512 text tokens")],
)
def test_heads_and_text_must_divide(degree, heads, text, named):
    problem = context_parallel_problem(degree, heads, text, [("square", 3600)])
    assert problem is not None
    assert named in problem


def test_a_refused_bucket_is_named(dit_corpus):
    model = build_tiny_transformer(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=32,
        axes_dims_rope=(2, 2, 2),
        joint_attention_dim=16,
        pooled_projection_dim=16,
        in_channels=64,
    )
    index = pd.read_parquet(dit_corpus / "latents" / "index.parquet")
    check_context_parallel(model, 2, 8, index)
    with pytest.raises(ValueError, match=r"^runtime.context_parallel_degree 32: bucket \S+ has \d"):
        check_context_parallel(model, 32, 64, index)


def test_degree_that_does_not_divide_the_ranks_is_refused(make_dit_job, tmp_path):
    with pytest.raises(ValueError, match="does not divide the 3 ranks"):
        make_dit_job(tmp_path, processes=3, context_parallel_degree=2)


def test_samples_are_divided_over_groups_of_ranks(make_dit_job, tmp_path):
    ranks = [Ranks(rank, 8, torch.device("cpu"), context_degree=4) for rank in range(8)]
    assert [r.data_rank for r in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {r.data_world_size for r in ranks} == {2}
    settings = make_dit_job(tmp_path).settings
    configuration = engine_configuration(settings, 8, 10_000, context_degree=4)
    # Global batch 4, micro batch 2, two groups: one micro batch each.
    assert configuration["gradient_accumulation_steps"] == 1
    assert configuration["train_batch_size"] == 4 * 4


@pytest.mark.slow
@pytest.mark.usefixtures("training_environment_restored")
@pytest.mark.parametrize(
    ("checkpointing", "zero_stage"), [("none", 2), ("blocks", 3), ("selective", 2)]
)
def test_two_ranks_of_one_sample_train_like_one_process_and_resume_exactly(
    make_dit_job, tmp_path, checkpointing, zero_stage
):
    options = {
        "precision": "fp32",
        "gradient_checkpointing": checkpointing,
        "zero_stage": zero_stage,
    }
    alone = make_dit_job(tmp_path / "alone", **options)
    run_job(alone)
    pair = make_dit_job(tmp_path / "pair", processes=2, context_parallel_degree=2, **options)
    run_job(pair)
    for one, two in zip(rows(alone), rows(pair), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name in WEIGHTS_NAMES:
        ours, theirs = weights(alone, name), weights(pair, name)
        for key, tensor in ours.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=2e-5, msg=key)

    expected = {name: weights(pair, name) for name in WEIGHTS_NAMES}
    logged = rows(pair)
    shutil.rmtree(pair.export_dir)
    checkpoints = sorted((pair.state_dir / "checkpoints").glob("step-*"))
    shutil.rmtree(checkpoints[-1])
    run_job(pair)
    assert rows(pair) == logged
    for name in WEIGHTS_NAMES:
        resumed = weights(pair, name)
        assert all(torch.equal(resumed[key], tensor) for key, tensor in expected[name].items())
