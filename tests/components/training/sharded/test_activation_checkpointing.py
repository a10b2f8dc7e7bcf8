from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from components.training.sharded.activation_checkpointing import enable_activation_checkpointing


class LiveResults(TorchDispatchMode):
    """Bytes of operator results that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self) -> int:
        gc.collect()
        return sum(size for ref, size in self.storages.values() if not ref.expired())


def inputs_of(backbone):
    generator = torch.Generator().manual_seed(1)
    tokens = (1, 48, 64) if backbone == "flux" else (1, 16, 12, 16)
    inputs = {
        "hidden_states": torch.randn(tokens, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 16, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "return_dict": False,
    }
    if backbone == "sd3":
        return inputs | {"timestep": torch.tensor([300.0])}
    times = {"timestep": torch.tensor([0.3]), "guidance": torch.tensor([4.0])}
    return inputs | times | {"img_ids": None, "txt_ids": None, "grid_hw": (6, 8)}


def measure(model, inputs, policy):
    """(gradients, bytes held between forward and backward, FLOPs of both)."""
    model.train()
    enable_activation_checkpointing(model, policy)
    live = LiveResults()
    with FlopCounterMode(display=False) as flops:
        with live:
            loss = model(**inputs)[0].square().mean()
        held = live.bytes()
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, held, flops.get_total_flops()


@pytest.mark.parametrize("backbone", ["flux", pytest.param("sd3", marks=pytest.mark.slow)])
def test_selective_lies_between_storing_all_and_blocks_alone(tiny_backbone, backbone):
    gradients, held, flops = {}, {}, {}
    for policy in ("none", "blocks", "selective"):
        gradients[policy], held[policy], flops[policy] = measure(
            tiny_backbone(backbone), inputs_of(backbone), policy
        )
    assert held["blocks"] < held["selective"] < held["none"]
    # No matrix product is done twice.
    assert flops["selective"] == flops["none"] < flops["blocks"]
    for policy in ("blocks", "selective"):
        assert gradients[policy].keys() == gradients["none"].keys()
        for name, gradient in gradients["none"].items():
            assert torch.equal(gradients[policy][name], gradient), (policy, name)


def test_an_unwanted_policy_can_be_taken_back(tiny_backbone):
    model = tiny_backbone("flux")
    enable_activation_checkpointing(model, "blocks")
    enable_activation_checkpointing(model, "none")
    assert not model.gradient_checkpointing
    assert torch.isfinite(model.train()(**inputs_of("flux"))[0]).all()


def test_inputs_of_blocks_that_wait_on_the_host_change_no_gradient(tiny_backbone):
    gradients = []
    for to_host in (False, True):
        model, inputs = tiny_backbone("flux").train(), inputs_of("flux")
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        enable_activation_checkpointing(model, "blocks", to_host=to_host)
        model(**inputs)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
