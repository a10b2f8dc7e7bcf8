"""One rank of a two-process run: context-parallel outputs of the tiny transformer.

    python context_parallel_rank.py RANK RENDEZVOUS_FILE RESULT.pt

A script and not a test: `test_transformer_compiled.py` starts it twice.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from components.models.resonance_rope import grid_ids
from components.models.tiny import build_tiny_transformer

GRIDS = ((6, 4), (4, 10))


def transformer() -> torch.nn.Module:
    """Two attention heads, so that two ranks can share them; a window that all grids exceed."""
    model = build_tiny_transformer(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=12,
        pooled_projection_dim=10,
        in_channels=16,
        rope_window=3,
    )
    with torch.no_grad():
        model.proj_out.weight.normal_(generator=torch.Generator().manual_seed(9))
    return model


def inputs(grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Random inputs, equal on every rank."""
    generator = torch.Generator().manual_seed(4)
    return {
        "hidden_states": torch.randn(2, grid[0] * grid[1], 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 8, 12, generator=generator),
        "pooled_projections": torch.randn(2, 10, generator=generator),
        "timestep": torch.tensor([0.3, 0.9]),
        "guidance": torch.tensor([4.0, 1.0]),
    }


@torch.no_grad()
def main(rank: int, rendezvous: str, result: str) -> None:
    """Compare ways of calling with the single-process output; rank 0 saves the differences."""
    torch.set_num_threads(1)
    # diffusers divides the rank by the number of accelerators, of which this machine may have none.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = transformer()
    expected = {grid: model(**inputs(grid), grid_hw=grid).sample for grid in GRIDS}
    model.set_attention_backend("native")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    differences = {}
    for grid, whole in expected.items():
        text = torch.zeros(8, 3)
        calls = {
            "grid": {"grid_hw": grid, "img_ids": None, "txt_ids": None},
            "ids": {"grid_hw": grid, "img_ids": grid_ids(*grid), "txt_ids": text},
            "batched_ids": {"grid_hw": grid, "img_ids": grid_ids(*grid)[None], "txt_ids": text},
        }
        for name, arguments in calls.items():
            output = model(**inputs(grid), **arguments, return_dict=False)[0]
            differences[grid, name] = float((output - whole).abs().max())
    try:
        model(**inputs(GRIDS[0]), img_ids=grid_ids(*GRIDS[0]), txt_ids=torch.zeros(8, 3))
        refusal = ""
    except ValueError as problem:
        refusal = str(problem)
    if rank == 0:
        scale = min(float(whole.std()) for whole in expected.values())
        torch.save({"differences": differences, "refusal": refusal, "scale": scale}, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
