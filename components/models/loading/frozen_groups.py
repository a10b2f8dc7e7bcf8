"""diffusers' groups of offloaded weights for weights that never change; import it where it is used.

Used by `block_offload.offload_frozen_blocks`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.group_offloading import (
    GroupOffloadingHook,
    ModuleGroup,
    _is_torchao_tensor,
    _restore_torchao_tensor,
)

HOOK = "frozen_group_offloading"
"""Not diffusers' own name: networks with a hook of that refuse to be moved, parts that stay too."""


class FrozenGroup(ModuleGroup):  # type: ignore[misc]
    """Weights of one block, with one copy on the host that is kept."""

    is_here = False
    """On the device."""

    def _init_cpu_param_dict(self) -> dict[torch.Tensor, torch.Tensor]:
        return {one: self._to_cpu(one, self.low_cpu_mem_usage) for one in self.parameters}

    def _transfer_tensor_to_device(
        self, tensor: torch.Tensor, source_tensor: torch.Tensor, default_stream: Any
    ) -> None:
        moved = source_tensor.to(self.onload_device)
        if _is_torchao_tensor(tensor):
            # What is inside is exchanged. diffusers exchanges the whole tensor, which an optimizer
            # or engine with a weak reference to it does not allow.
            _restore_torchao_tensor(tensor, moved)
        else:
            tensor.data = moved

    def _onload_from_memory(self) -> None:
        self._process_tensors_from_modules(self.cpu_param_dict)
        self.is_here = True

    def _offload_to_memory(self) -> None:
        for parameter, waiting in self.cpu_param_dict.items():
            if _is_torchao_tensor(parameter):
                _restore_torchao_tensor(parameter, waiting)
            else:
                parameter.data = waiting
        self.is_here = False


class FrozenGroupHook(GroupOffloadingHook):  # type: ignore[misc]
    """Also takes a block back that was not run to its end."""

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        except BaseException:
            # A checkpoint stops its repetition by an exception as soon as all that backward needs
            # is there: the block's hook after forward is then never reached.
            self.group.offload_()
            raise
