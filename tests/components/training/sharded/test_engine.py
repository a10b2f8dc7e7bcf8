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


class HalfUsed(torch.nn.Module):
    """Two weights of which the loss sees one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.used = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
        self.unused = torch.nn.Parameter(torch.randn(7, generator=generator))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return (values @ self.used).square().mean()


def test_one_process_without_zero_takes_the_step_of_torch(
    make_dit_job, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    settings = make_dit_job(tmp_path, zero_stage=0, precision="fp32").settings
    model, twin = HalfUsed(), HalfUsed()
    optimizer = torch.optim.AdamW(
        twin.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    micro_batches = settings.global_batch_size // settings.micro_batch_size
    values = torch.randn(micro_batches, 2, 5, generator=torch.Generator().manual_seed(2))
    with open_ranks("cpu") as ranks:
        engine = initialize_engine(model, settings, ranks)
        # One process has nobody to add up with.
        monkeypatch.setattr(engine, "allreduce_bucket", None)
        for micro in values:
            engine.backward(engine(micro))
            engine.step()
        stepped = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for micro in values:
        (twin(micro) / micro_batches).backward()
    twin.unused.grad = torch.zeros(7)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), settings.max_grad_norm)
    optimizer.step()
    assert settings.weight_decay > 0
    for name, weight in twin.named_parameters():
        assert torch.equal(stepped[name], weight.detach()), name
    assert not torch.equal(stepped["unused"], HalfUsed().unused.detach())
