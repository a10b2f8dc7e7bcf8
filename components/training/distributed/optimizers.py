"""The optimizer of a stage, and where its state lives.

One learning rate serves all parts of an optimizer; the trainer sets it at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from components.files.install_hints import install_hint
from components.settings.training import DitStageSettings

DECAYS = "decays"
"""Key of a parameter group: whether `weight_decay` acts on it."""


def learning_rate(step: int, settings: DitStageSettings) -> float:
    """Learning rate of optimizer step `step` (0 first): linear warm-up, then the schedule.

    `cosine` falls to zero at the last step.
    """
    # Counted from 1: at 0 the first step would change nothing.
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    # Never zero, even where the whole stage is warm-up.
    remaining = max(1, settings.steps - settings.warmup_steps)
    progress = (step - settings.warmup_steps) / remaining
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: DitStageSettings
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters.

    Args:
        parameters: of the model, before anything divides them; frozen ones are left out.
        settings: kind, rate, betas, eps, weight decay and what it acts on. `adamw_8bit` keeps both
            moments in 8 bits per value with a scale per block of 256 (Dettmers et al., 2110.02861).
            `adafactor`: Shazeer and Stern, 1804.04235, as torch has it; its step is relative to
            the size of a weight, so `learning_rate` means another thing (torch's default: 1e-2).
            `muon`: torch's, with steps of the size of AdamW's (Liu et al., 2502.16982).

    Raises:
        ValueError: bitsandbytes is not installed, or `muon` finds no matrix.
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
        optimizer: torch.optim.Optimizer = AdamW8bit(_groups(trained, settings), **_adam(settings))
        return optimizer
    if settings.optimizer == "adafactor":
        # torch's other constants are those of the paper.
        return torch.optim.Adafactor(_groups(trained, settings), lr=settings.learning_rate)
    if settings.optimizer == "muon":
        return MuonAndAdamW(trained, settings)
    return torch.optim.AdamW(_groups(trained, settings), **_adam(settings))


def described_optimizer(settings: DitStageSettings) -> str:
    """Name and constants, such as "AdamW (betas 0.9, 0.999, eps 1e-08, weight decay 0.01)"."""
    adam = f"betas {settings.betas[0]:g}, {settings.betas[1]:g}, eps {settings.eps:g}"
    name, constants = {
        "adamw": ("AdamW", [adam]),
        "adamw_8bit": ("AdamW with 8-bit moments", [adam]),
        "adafactor": ("Adafactor", []),
        "muon": ("Muon and AdamW", [f"momentum {settings.muon_momentum:g}", adam]),
    }[settings.optimizer]
    spared = "" if settings.decayed_weights == "all" else " except of norms and biases"
    constants = [*constants, f"weight decay {settings.weight_decay:g}{spared}"]
    return f"{name} ({', '.join(constants)})"


def apply_settings(optimizer: Any, settings: DitStageSettings) -> None:
    """Today's settings in place of those that came back with the state of `optimizer`.

    torch saves settings with the moments, so that a segment with other values would go on with the
    old ones. The learning rate is set at every step.

    Args:
        optimizer: with `param_groups`, such as DeepSpeed's around one of `build_optimizer`.
        settings: of the stage.
    """
    values = {"betas": settings.betas, "eps": settings.eps, "momentum": settings.muon_momentum}
    for group in optimizer.param_groups:
        # Only what the group has: Adafactor's `eps` is another thing, and it has no betas; Muon's
        # is a guard of a division.
        if "betas" in group:
            group.update({key: values[key] for key in ("betas", "eps")})
        if "ns_steps" in group:
            group["momentum"] = values["momentum"]
        group["weight_decay"] = settings.weight_decay if group.get(DECAYS, True) else 0.0


def _adam(settings: DitStageSettings) -> dict[str, Any]:
    return {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}


def _groups(trained: list[nn.Parameter], settings: DitStageSettings) -> list[dict[str, Any]]:
    """Parameter groups of one weight decay each, none of them empty."""
    if settings.decayed_weights == "all":
        return [{"params": trained, "weight_decay": settings.weight_decay, DECAYS: True}]
    groups = (
        {
            # By axes and not by names: norms and biases of every backbone are vectors.
            "params": [parameter for parameter in trained if (parameter.dim() >= 2) is decays],
            "weight_decay": settings.weight_decay if decays else 0.0,
            DECAYS: decays,
        }
        for decays in (True, False)
    )
    # DeepSpeed drops empty groups, which would move the numbers of the others.
    return [group for group in groups if group["params"]]


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices, torch's AdamW for all else, as one optimizer."""

    def __init__(self, trained: list[nn.Parameter], settings: DitStageSettings) -> None:
        """Divide `trained` by their axes.

        Raises:
            ValueError: there is no matrix.
        """
        matrices = [parameter for parameter in trained if parameter.dim() == 2]
        others = [parameter for parameter in trained if parameter.dim() != 2]
        if not matrices:
            raise ValueError("optimizer 'muon' finds no matrix to train: use 'adamw'")
        muon = torch.optim.Muon(
            _groups(matrices, settings),
            lr=settings.learning_rate,
            momentum=settings.muon_momentum,
            # Updates as large as AdamW's, so that both learn at one rate.
            adjust_lr_fn="match_rms_adamw",
        )
        self._parts: list[torch.optim.Optimizer] = [muon]
        if others:
            self._parts.append(torch.optim.AdamW(_groups(others, settings), **_adam(settings)))
        # For what every optimizer has, such as hooks; groups and state are those of the parts.
        super().__init__(trained, {})
        self._join()

    def _join(self) -> None:
        # The parts' own dictionaries: what is set in a group here is set there.
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state.clear()
        self.state.update(chain.from_iterable(part.state.items() for part in self._parts))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters; `closure` is not called."""
        for part in self._parts:
            part.step()
        self._join()

    def state_dict(self) -> dict[str, Any]:
        """Of both parts, in order."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()


def offload_configuration(settings: DitStageSettings) -> dict[str, Any]:
    """Entries of DeepSpeed's `zero_optimization` that keep optimizer states in host memory.

    The update then runs on the host with torch's AdamW; DeepSpeed's own CPU kernel would need a
    compiler on the training machine.
    """
    if settings.offload_optimizer == "none":
        return {}
    # Page-locked memory is a service of CUDA; without a GPU there is nothing to copy to.
    return {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
