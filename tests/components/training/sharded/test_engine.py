"""The engine's float32 masters are the weights that it was given, whatever ZeRO divides."""

from __future__ import annotations

import pytest
import torch

from components.models.tiny import build_tiny_transformer
from components.training.distributed.ranks import open_ranks
from components.training.sharded.engine import initialize_engine
from components.training.sharded.weight_shards import assemble, master_shards

pytestmark = pytest.mark.usefixtures("training_environment_restored")

MOVE = 2e-5
"""Root mean square of what 2,000 steps at a learning rate of 1e-6 move a weight by."""


def learned_weights() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model whose weights are bfloat16 values moved a little; those values, and the weights."""
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
    before = {name: p.detach().bfloat16().float() for name, p in model.named_parameters()}
    moved = {n: v + MOVE * torch.randn(v.shape, generator=generator) for n, v in before.items()}
    model.load_state_dict(moved, strict=False)
    return model, before, moved


@pytest.mark.parametrize(
    ("zero_stage", "precision", "offload"),
    [
        (0, "fp32", "none"),
        (1, "bf16", "none"),
        (2, "bf16", "none"),
        (3, "bf16", "none"),
        (2, "bf16", "cpu"),
        (3, "bf16", "cpu"),
        (3, "fp32", "none"),
    ],
)
def test_masters_are_the_given_weights_bit_for_bit(
    make_dit_job, tmp_path, zero_stage, precision, offload
):
    settings = make_dit_job(
        tmp_path, zero_stage=zero_stage, precision=precision, offload_optimizer=offload
    ).settings
    model, before, moved = learned_weights()
    with open_ranks("cpu") as ranks:
        engine = initialize_engine(model, settings, ranks)
        masters = {s.name: assemble(s, ranks) for s in master_shards(engine, ranks)}
    assert masters.keys() == moved.keys()
    error = sum((masters[n] - moved[n]).double().square().sum() for n in moved)
    movement = sum((moved[n] - before[n]).double().square().sum() for n in moved)
    assert float((error / movement).sqrt()) == 0.0
    assert all(
        torch.equal(masters[name].view(torch.int32), moved[name].view(torch.int32))
        for name in moved
    )


def test_the_model_computes_with_the_rounded_masters(make_dit_job, tmp_path):
    model, _, moved = learned_weights()
    with open_ranks("cpu") as ranks:
        engine = initialize_engine(model, make_dit_job(tmp_path).settings, ranks)
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(parameter.detach(), moved[name].bfloat16())
