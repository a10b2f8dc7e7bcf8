"""A network whose blocks wait in host memory and come to the device one at a time.

diffusers' group offloading at block level: a copy is a copy, so results are those of the whole
network on the device, bit for bit. On CUDA the next block travels while one computes.
"""

from __future__ import annotations

from typing import Any

import torch


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
