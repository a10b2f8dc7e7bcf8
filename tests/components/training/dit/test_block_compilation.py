"""Compiled blocks: one graph of a kind, the same training, and resume with the same bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.models.loading.block_compile import compile_blocks
from components.objectives.objective import objective_loss
from components.settings.schema import load_settings
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoints import CheckpointStore
from components.training.dit.block_compilation import (
    check_compilation,
    compilation_problem,
    compile_for_buckets,
    uncompiled,
)
from components.training.dit.job import WEIGHTS_NAMES
from components.training.dit.throughput import MACHINE_METRICS
from components.training.dit.velocity import NoisedBatch, predict_velocity

ROOT = Path(__file__).resolve().parents[4]
# The first has as many image tokens as text tokens.
GRIDS = ((2, 4), (4, 4), (6, 8), (4, 12), (10, 10), (6, 12))
# A double block; a single block on contiguous streams, and on the views that one gives.
KINDS = 3
PATIENCE_S = 1500.0


class Engine:
    """What an engine shows of its model."""

    def __init__(self, module):
        self.module = module


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def not_zero(model):
    """The model with noise on its weights: tiny ones predict zero at first."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def batch(grid, count=2):
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    size = (count, 16, 2 * grid[0], 2 * grid[1])
    latents, noise = (torch.randn(size, generator=generator) for _ in range(2))
    text = torch.randn(count, 8, 16, generator=generator)
    pooled = torch.randn(count, 16, generator=generator)
    return NoisedBatch(("",) * count, latents, noise, torch.full((count,), 0.3), text, pooled)


def gradients(model, grid):
    model.zero_grad()
    predict_velocity(model, batch(grid), 4.0, torch.float32).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zero_stage": 3}, "zero_stage 2"),
        ({"gradient_checkpointing": "selective"}, "'blocks' or 'none'"),
        (
            {
                "offload_base": True,
                "gradient_checkpointing": "blocks",
                "adapter": {"rank": 1, "alpha": 1, "target_modules": ["to_q"]},
            },
            "offload_base",
        ),
        ({"processes": 2, "context_parallel_degree": 2}, "context_parallel_degree 1"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(make_dit_job, tmp_path, changes, named):
    job = make_dit_job(tmp_path, compile="blocks", **changes)
    problem = compilation_problem(job.settings, job.runtime)
    assert problem is not None
    assert named in problem
    assert "\n" not in problem
    # What the plan advises against, training refuses.
    with pytest.raises(ValueError, match=re.escape(problem)):
        check_compilation(job.settings, job.runtime)


def test_without_a_compiler_only_the_cpu_is_refused(make_dit_job, tmp_path):
    from torch._inductor import config

    job = make_dit_job(tmp_path, compile="blocks")
    on_gpu = job.runtime.model_copy(update={"device": "cuda"})
    with config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        check_compilation(job.settings, on_gpu)
        with pytest.raises(ValueError, match=r"^runtime\.compile 'blocks': .* needs a C\+\+ comp"):
            check_compilation(job.settings, job.runtime)
    check_compilation(job.settings, job.runtime)


def test_nothing_is_refused_without_compilation(make_dit_job, tmp_path):
    job = make_dit_job(tmp_path, zero_stage=3, gradient_checkpointing="selective")
    assert compilation_problem(job.settings, job.runtime) is None


@pytest.mark.slow
def test_few_graphs_serve_every_bucket_and_agree_with_plain_blocks(tiny_backbone):
    plain, compiled = (not_zero(tiny_backbone("flux")) for _ in range(2))
    names = list(compiled.state_dict())
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == names
    torch._dynamo.utils.counters.clear()
    compile_for_buckets(Engine(compiled), (batch(grid) for grid in GRIDS), 4.0, torch.float32)
    made = graphs()
    assert made <= KINDS
    assert all(parameter.grad is None for parameter in compiled.parameters())
    for grid in reversed(GRIDS):
        expected = gradients(plain, grid)
        for name, gradient in gradients(compiled, grid).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    with uncompiled(), torch.no_grad():
        ours, theirs = (
            predict_velocity(m, batch((8, 8), 1), 4.0, torch.float32) for m in (plain, compiled)
        )
    assert torch.equal(ours, theirs)
    assert graphs() == made


@pytest.mark.slow
def test_one_graph_of_the_objective_serves_every_bucket(tiny_backbone):
    objective = load_settings(ROOT / "params.yaml").objective
    assert objective.kind == "snr_huber"
    model = not_zero(tiny_backbone("flux"))
    torch._dynamo.utils.counters.clear()
    sizes = (batch(grid) for grid in GRIDS)
    compile_for_buckets(Engine(model), sizes, 4.0, torch.float32, objective)
    assert graphs() == 1
    for grid in reversed(GRIDS):
        one = batch(grid)
        velocity = predict_velocity(model, one, 4.0, torch.float32).detach().requires_grad_(True)
        found = []
        for compiled in (False, True):
            loss = objective_loss(
                objective, velocity, one.latents, one.noise, one.t, compiled=compiled
            )
            found.append((loss, *torch.autograd.grad(loss.sum(), velocity)))
        for expected, actual in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)
    assert graphs() == 1


def rows(job):
    return [
        {name: value for name, value in row.items() if name not in MACHINE_METRICS}
        for row in MetricLog(job.metrics).rows()
    ]


def weights(job, name):
    return load_file(job.export_dir / name / "diffusion_pytorch_model.safetensors")


def start(job):
    job.state_dir.mkdir(parents=True, exist_ok=True)
    path = job.state_dir / "job.json"
    path.write_text(job.model_dump_json())
    command = [sys.executable, "-m", "components.training.dit.worker", str(path)]
    # Every process compiles for itself.
    own = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(job.state_dir / "compiled")}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdin=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.usefixtures("training_environment_restored")
def test_compiled_training_killed_anywhere_resumes_with_the_same_bytes(make_dit_job, tmp_path):
    options = {
        "steps": 12,
        "checkpoint_every": 3,
        "validate_every": 6,
        "gradient_checkpointing": "blocks",
    }
    whole = make_dit_job(tmp_path / "whole", compile="blocks", **options)
    assert start(whole).wait(PATIENCE_S) == 0
    killed = make_dit_job(tmp_path / "killed", compile="blocks", **options)
    process = start(killed)
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        if killed.metrics.exists() and len(MetricLog(killed.metrics).series("loss")[0]) >= 4:
            break
        time.sleep(0.02)
    assert process.poll() is None, "the job ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = CheckpointStore(killed.state_dir / "checkpoints", keep=2).latest()
    assert newest is not None
    assert 3 <= newest[0] < 12
    assert start(killed).wait(PATIENCE_S) == 0
    assert rows(killed) == rows(whole)
    for name in WEIGHTS_NAMES:
        ours, theirs = weights(whole, name), weights(killed, name)
        assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())
