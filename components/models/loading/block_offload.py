"""A network whose blocks wait in host memory and come to the device one at a time.

diffusers' group offloading at block level: a copy is a copy, so results are those of the whole
network on the device, bit for bit. On CUDA the next block travels while one computes.
"""

from __future__ import annotations

from typing import Any

import torch

from components.models.loading.transformer_blocks import transformer_blocks


def offload_blocks(model: Any, device: torch.device | str) -> None:
    """Let the blocks of `model` wait on the CPU.

    Args:
        model: of diffusers or transformers, on the CPU; nothing in it may be rounded to nf4, whose
            scales do not travel.
        device: where blocks compute.
    """
    from diffusers.hooks import apply_group_offloading

    on_cuda = torch.device(device).type == "cuda"
    apply_group_offloading(
        model,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_cuda,
        # A block's memory is given to the next one only when the kernels that read it are through.
        record_stream=on_cuda,
        # Pinned block by block and not all at once: 24 GB of page-locked memory are not to be had
        # on every machine.
        low_cpu_mem_usage=True,
    )


def offload_layers(model: Any, device: torch.device | str) -> None:
    """Likewise for networks whose blocks lie deeper, such as text encoders: layer by layer."""
    from diffusers.hooks import apply_group_offloading

    on_cuda = torch.device(device).type == "cuda"
    apply_group_offloading(
        model,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=on_cuda,
        record_stream=on_cuda,
        low_cpu_mem_usage=True,
    )


def end_offload(model: Any) -> None:
    """The network as it was before `offload_blocks`, on the CPU."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.group_offloading import _GROUP_OFFLOADING

    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.remove_hook(_GROUP_OFFLOADING, recurse=True)
    # What was on the device when the last pass ended.
    model.to("cpu")


def waits_on_host(parameter: torch.Tensor) -> bool:
    """Whether it comes to the device with its block alone, so that nothing else may move it."""
    return getattr(parameter, "waits_on_host", False)


def offload_frozen_blocks(model: Any, device: torch.device | str, dtype: torch.dtype) -> None:
    """Let the frozen weights of blocks wait on the CPU while adapters beside them are trained.

    diffusers' hooks at block level once more, over weights that are not trained alone: those that
    are stay on their device, where the optimizer has them. A block's weights are there while it
    runs forward and while a checkpointed backward pass repeats it; what autograd saved of them then
    lives until the block's gradients are done. They are copies, so gradients are those of a base
    that stays on the device, bit for bit.

    Deviation: without a stream of its own. diffusers fetches the next block in forward order, and
    a backward pass comes from behind. Nothing is copied back: frozen weights do not change.

    Args:
        model: a diffusers transformer with adapters and checkpointed blocks; nothing in nf4.
        device: where blocks compute.
        dtype: in which frozen weights wait; rounded ones keep theirs.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.group_offloading import GroupOffloadingConfig, GroupOffloadingType

    from components.models.loading.frozen_groups import HOOK, FrozenGroup, FrozenGroupHook
    from components.models.loading.quantisation import is_quantised

    host = torch.device("cpu")
    config = GroupOffloadingConfig(
        onload_device=torch.device(device),
        offload_device=host,
        offload_type=GroupOffloadingType.BLOCK_LEVEL,
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=True,
    )
    for block in transformer_blocks(model):
        frozen = [weights for weights in block.parameters() if not weights.requires_grad]
        for weights in frozen:
            weights.waits_on_host = True
            if not is_quantised(weights):
                weights.data = weights.data.to(host, dtype)
        group = FrozenGroup(
            modules=[],
            parameters=frozen,
            offload_device=host,
            onload_device=config.onload_device,
            offload_leader=block,
            onload_leader=block,
            low_cpu_mem_usage=True,
        )
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(FrozenGroupHook(group, config=config), HOOK)
