"""What a planned run would fail on, and which setting to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from components.settings import Settings
from components.training.memory_plan import GIB
from components.training.planned_transformer import Transformer, dit_memory
from components.training.settings import DitStageSettings

_MOST_GPUS = 1024


def offered_zero_stages() -> tuple[int, ...]:
    """ZeRO stages that the settings allow, ascending."""
    return tuple(sorted(get_args(DitStageSettings.model_fields["zero_stage"].annotation)))


def refusals(settings: Settings) -> list[str]:
    """Settings that the training engine would refuse at its start, a line each."""
    found = []
    for name in ("dit_stage1", "dit_stage2"):
        stage: DitStageSettings = getattr(settings, name)
        share = stage.micro_batch_size * settings.runtime.processes
        if stage.global_batch_size % share:
            found.append(
                f"{name}: global_batch_size {stage.global_batch_size} is not a multiple of "
                f"micro_batch_size {stage.micro_batch_size} x runtime.processes "
                f"{settings.runtime.processes}; set it to "
                f"{-(-stage.global_batch_size // share) * share}"
            )
    return found


def too_large(
    name: str, needed: int, transformer: Transformer, sizes: Sequence[tuple[int, int]], limit: int
) -> list[str]:
    """A warning when a stage does not fit, with the first change of settings that makes it fit."""
    if needed <= limit:
        return []
    text = f"{name}: needs {needed / GIB:.1f} GiB of {limit / GIB:.1f} GiB"
    if name.startswith("dit_"):
        return [f"{text}; {_cure(name, transformer, sizes, limit)}"]
    if name == "vae":
        changes = "vae.micro_batch_size, or set vae.gradient_checkpointing to true"
        return [f"{text}; lower {changes}"]
    if name == "generate":
        return [f"{text} for weights alone; use ultraflux generate --memory text-first"]
    return [f"{text} for weights in float32; choose a larger GPU"]


def _cure(name: str, transformer: Transformer, sizes: Sequence[tuple[int, int]], limit: int) -> str:
    """Changes, one after another, until the stage fits; what to do where none helps."""
    stage: DitStageSettings = getattr(transformer.settings, name)
    gpus = transformer.settings.runtime.processes
    changes: list[str] = []
    wanted = (
        ("precision", "bf16"),
        ("gradient_checkpointing", "blocks"),
        ("zero_stage", max(2, stage.zero_stage)),
        ("micro_batch_size", 1),
        ("ema_device", "cpu"),
        ("zero_stage", offered_zero_stages()[-1]),
    )
    for key, value in wanted:
        if getattr(stage, key) == value:
            continue
        stage = stage.model_copy(update={key: value})
        # A later value replaces an earlier one of the same setting.
        changes = [text for text in changes if not text.startswith(f"{name}.{key}:")]
        changes.append(f"{name}.{key}: {str(value).lower()}")
        if dit_memory(stage, transformer, sizes, gpus).total <= limit:
            return "set " + ", ".join(changes)
    while gpus < _MOST_GPUS:
        gpus *= 2
        if dit_memory(stage, transformer, sizes, gpus).total <= limit:
            return "set " + ", ".join([*changes, f"runtime.processes: {gpus}"])
    memory = dit_memory(stage, transformer, sizes, _MOST_GPUS)
    return (
        f"no number of GPUs helps: {_MOST_GPUS} of them with "
        f"{', '.join(changes) or 'these settings'} would still need {memory.total / GIB:.1f} GiB "
        "each for weights, activations and buffers; choose a GPU with more memory"
    )
