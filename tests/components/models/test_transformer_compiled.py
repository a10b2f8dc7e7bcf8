"""The transformer under torch.compile and under diffusers' context parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from components.models.tiny import build_tiny_transformer
from components.models.transformer import UltraFluxTransformer2DModel

ROOT = Path(__file__).resolve().parents[3]
BUCKETS = ((5, 3), (4, 8))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def _model() -> UltraFluxTransformer2DModel:
    model = build_tiny_transformer(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=12,
        pooled_projection_dim=10,
        in_channels=16,
        rope_window=4,
    )
    with torch.no_grad():
        model.proj_out.weight.normal_(generator=torch.Generator().manual_seed(9))
    return model


def _inputs(grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "hidden_states": torch.randn(1, grid[0] * grid[1], 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 12, generator=generator),
        "pooled_projections": torch.randn(1, 10, generator=generator),
        "timestep": torch.tensor([0.3]),
        "guidance": torch.tensor([4.0]),
    }


@pytest.mark.slow
@torch.no_grad()
def test_whole_forward_compiles_without_a_graph_break_once_per_bucket() -> None:
    model, counter = _model(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for grid in (*BUCKETS, *BUCKETS):
        expected = model(**_inputs(grid), grid_hw=grid).sample
        actual = compiled(**_inputs(grid), grid_hw=grid, return_dict=False)[0]
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    # fullgraph raises at a break; a bucket seen before must not compile again.
    assert counter.frame_count == len(BUCKETS)


@pytest.mark.slow
def test_inductor_gives_the_same_outputs_and_gradients() -> None:
    model = _model()
    compiled = torch.compile(model, fullgraph=True)
    weight = model.proj_out.weight
    for grid in BUCKETS:
        results = []
        for forward in (model, compiled):
            output = forward(**_inputs(grid), grid_hw=grid, return_dict=False)[0]
            (gradient,) = torch.autograd.grad(output.square().mean(), weight)
            results.append((output.detach(), gradient))
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_context_parallel_ranks_give_the_single_process_output(tmp_path: Path) -> None:
    script = Path(__file__).with_name("context_parallel_rank.py")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        # diffusers asks for its mesh by local rank.
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
    }
    result = tmp_path / "result.pt"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meet"), str(result)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=400)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-4000:]
    found = torch.load(result, weights_only=True)
    assert found["scale"] > 1
    assert len(found["differences"]) == 6
    # Float32 sums in another order, relative to the outputs' spread.
    assert max(found["differences"].values()) < 5e-6 * found["scale"]
    assert found["refusal"].startswith("grid_hw:")
