"""What a small learning rate has taught, before and after stage 2's engine is made.

    python benchmarks/hand_over.py

Weights of a tiny transformer are bfloat16 values moved by 2e-5 (root mean square), as 2,000 steps
at a learning rate of 1e-6 move them. A row for each ZeRO stage: error of the float32 masters over
that movement, and how many of them are back at the value before it; for masters that are made of
the rounded weights (what the engine computes with, and DeepSpeed's own way) and for those that the
engine has. ZeRO 0 has no masters beside float32 weights.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import yaml

from components.models.tiny import build_tiny_transformer
from components.settings.schema import parse_settings
from components.training.distributed.ranks import open_ranks
from components.training.sharded.engine import initialize_engine
from components.training.sharded.weight_shards import master_shards, model_values

ROOT = Path(__file__).resolve().parents[1]
MOVE = 2e-5


def measured(zero_stage: int) -> tuple[list[float], list[float]]:
    """(error over movement, share back at the start) of rounded and of actual masters."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    precision = "bf16" if zero_stage else "fp32"
    values["dit_stage2"].update(
        precision=precision, zero_stage=zero_stage, global_batch_size=1, micro_batch_size=1
    )
    settings = parse_settings(values).dit_stage2
    model = build_tiny_transformer(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=16,
        pooled_projection_dim=16,
        rope_window=4,
    )
    generator = torch.Generator().manual_seed(0)
    start = {name: p.detach().bfloat16().float() for name, p in model.named_parameters()}
    learned = {n: v + MOVE * torch.randn(v.shape, generator=generator) for n, v in start.items()}
    model.load_state_dict(learned, strict=False)
    errors, back, moved, count = [0.0, 0.0], [0, 0], 0.0, 0
    with open_ranks("cpu") as ranks:
        engine = initialize_engine(model, settings, ranks)
        parameters = dict(engine.module.named_parameters())
        for shard in master_shards(engine, ranks):
            before, after = start[shard.name].flatten(), learned[shard.name].flatten()
            moved += float((after - before).double().square().sum())
            count += before.numel()
            rounded = model_values(parameters[shard.name], shard).values.float()
            for number, values_now in enumerate((rounded, shard.values)):
                errors[number] += float((values_now - after).double().square().sum())
                back[number] += int((values_now == before).sum())
    return [math.sqrt(error / moved) for error in errors], [n / count for n in back]


def main() -> None:
    """The table."""
    print("| ZeRO | precision | of rounded weights | back at the start | here | back |")
    print("|---:|---|---:|---:|---:|---:|")
    for zero_stage in range(4):
        (rounded, actual), (rounded_back, back) = measured(zero_stage)
        precision = "bf16" if zero_stage else "fp32"
        print(
            f"| {zero_stage} | {precision} | {rounded:.2f} | {rounded_back:.1%} | {actual:.2f} | "
            f"{back:.1%} |"
        )


if __name__ == "__main__":
    main()
