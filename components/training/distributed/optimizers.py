"""The optimizer of a stage, and where its state lives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from components.files.install_hints import install_hint
from components.settings.training import DitStageSettings


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: DitStageSettings
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters.

    Args:
        parameters: of the model; frozen ones are left out.
        settings: kind, learning rate and weight decay. `adamw_8bit` keeps both moments in 8 bits
            per value with a scale per block of 256 (Dettmers et al., 2110.02861).

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    # DeepSpeed makes float32 masters of all that the optimizer holds: frozen weights stay out.
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if settings.optimizer == "adamw_8bit":
        try:
            # Here, because the import takes seconds and few runs need it.
            from bitsandbytes.optim.adamw import AdamW8bit
        except ImportError:
            raise ValueError(
                f"optimizer 'adamw_8bit' needs bitsandbytes: {install_hint('gpu')}"
            ) from None
        optimizer: torch.optim.Optimizer = AdamW8bit(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        return optimizer
    return torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def offload_configuration(settings: DitStageSettings) -> dict[str, Any]:
    """Entries of DeepSpeed's `zero_optimization` that keep optimizer states in host memory.

    The update then runs on the host with torch's AdamW; DeepSpeed's own CPU kernel would need a
    compiler on the training machine.
    """
    if settings.offload_optimizer == "none":
        return {}
    # Page-locked memory is a service of CUDA; without a GPU there is nothing to copy to.
    return {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
