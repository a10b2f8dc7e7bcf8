"""A frozen base whose blocks wait elsewhere while an adapter is trained: the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from components.models.backbones import backbone_of
from components.models.loading.block_offload import offload_frozen_blocks, waits_on_host
from components.models.loading.frozen_groups import HOOK
from components.models.loading.quantisation import is_quantised, quantise
from components.models.tiny import build_tiny_transformer
from components.settings.training import AdapterSettings
from components.training.dit.adapters import add_adapter
from components.training.sharded.activation_checkpointing import enable_activation_checkpointing

BLOCKS = 3


def adapted(kind):
    model = build_tiny_transformer(num_layers=1, num_single_layers=2, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    quantise(model, kind, dtype=torch.float32, device="cpu")
    add_adapter(model, AdapterSettings(rank=2, alpha=2, target_modules=("to_q", "proj_mlp")), 0)
    enable_activation_checkpointing(model, "blocks")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # Zero at first, and then no gradient reaches A.
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def gradients(model):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 8, 8, generator=generator)
    texts = (torch.randn(1, 8, 64, generator=generator), torch.randn(1, 64, generator=generator))
    velocity = backbone_of(model).predict(
        model, latents, torch.tensor([0.4]), *texts, guidance_scale=3.5, dtype=torch.float32
    )
    velocity.square().sum().backward()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return velocity.detach(), {name: one.grad for name, one in trained.items()}


def groups(model):
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return [block._diffusers_hook.get_hook(HOOK).group for block in blocks]


@pytest.mark.parametrize("kind", ["none", "int8", "fp8"])
def test_gradients_are_those_of_a_base_that_stays(kind):
    expected, wanted = gradients(adapted(kind))
    model = adapted(kind)
    offload_frozen_blocks(model, "cpu", torch.float32)
    frozen = [one for name, one in model.named_parameters() if "transformer_blocks" in name]
    assert all(waits_on_host(one) != one.requires_grad for one in frozen)
    assert not waits_on_host(model.x_embedder.weight)
    for _ in range(2):
        model.zero_grad()
        velocity, found = gradients(model)
        assert torch.equal(velocity, expected)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        # A checkpoint ends its repetition of a block before the block's end.
        assert not any(group.is_here for group in groups(model))


def test_weights_are_there_while_their_block_runs_and_what_waits_is_what_was_given():
    model = adapted("none")
    before = copy.deepcopy(model.state_dict())
    offload_frozen_blocks(model, "cpu", torch.float32)
    held = groups(model)
    seen = []
    for number, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):
        block.attn.register_forward_pre_hook(
            lambda *_, n=number: seen.append((n, [group.is_here for group in held]))
        )
    gradients(model)
    # Forward, and from behind once more; never two at once.
    assert [number for number, _ in seen] == [*range(BLOCKS), *reversed(range(BLOCKS))]
    assert all(here == [n == number for n in range(BLOCKS)] for number, here in seen)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rounded_weights_keep_their_form_and_the_others_take_the_type_they_compute_in():
    model = adapted("int8")
    offload_frozen_blocks(model, "cpu", torch.bfloat16)
    block = model.transformer_blocks[0]
    assert is_quantised(block.attn.to_k.weight)
    assert block.attn.norm_q.weight.dtype == torch.bfloat16
    assert block.attn.to_q.lora_A["default"].weight.dtype == torch.float32
