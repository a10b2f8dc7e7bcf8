"""What a planned run would fail on, and which setting to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from components.planning.memory import GIB
from components.planning.transformer import Transformer, dit_memory
from components.settings.training import DitStageSettings
from components.training.dit.block_compilation import compilation_problem
from components.training.sharded.context_parallel import context_parallel_problem

# Where the search ends: by then little but what no GPU shares is left.
_MOST_GPUS = 1024
# Degrees of context parallelism to try, smallest first: a degree takes GPUs from the batch.
_DEGREES = (2, 4, 8)


def _with_degree(transformer: Transformer, degree: int) -> Transformer:
    settings = transformer.settings
    # Copies: the plan in hand goes on with the settings that the user gave.
    runtime = settings.runtime.model_copy(update={"context_parallel_degree": degree})
    return replace(transformer, settings=settings.model_copy(update={"runtime": runtime}))


def offered_zero_stages() -> tuple[int, ...]:
    """ZeRO stages that the settings allow, ascending."""
    # Read from the schema, so that advice never names a value that the schema refuses.
    return tuple(sorted(get_args(DitStageSettings.model_fields["zero_stage"].annotation)))


def refusals(transformer: Transformer, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Settings that the training engine would refuse at its start, a line each."""
    settings = transformer.settings
    degree = settings.runtime.context_parallel_degree
    # GPUs that share the tokens of a sample count once towards the batch.
    groups = transformer.gpus // degree
    counted = f"runtime.processes {groups}" if degree == 1 else f"{groups} groups of {degree} GPUs"
    problem = _undivided(transformer, sizes, degree)
    found = [] if problem is None else [problem]
    for name in ("dit_stage1", "dit_stage2"):
        stage: DitStageSettings = getattr(settings, name)
        share = stage.micro_batch_size * groups
        problem = compilation_problem(stage, settings.runtime)
        found += [] if problem is None else [f"{name}: {problem}"]
        if stage.global_batch_size % share:
            found.append(
                f"{name}: global_batch_size {stage.global_batch_size} is not a multiple of "
                f"micro_batch_size {stage.micro_batch_size} x {counted}; set it to "
                f"{-(-stage.global_batch_size // share) * share}"
            )
    return found


def _undivided(
    transformer: Transformer, sizes: Sequence[tuple[int, int]], degree: int
) -> str | None:
    """What context parallelism cannot divide; None: nothing."""
    shape = transformer.networks.transformer
    if degree == 1:
        return None
    # diffusers has no plan for dividing the tokens of SD3.
    if shape is None:
        return f"runtime.context_parallel_degree {degree}: this backbone cannot be divided; use 1"
    latents = [(size, transformer.latent_hw(size)) for size in sizes]
    buckets = [(f"{h}x{w}", rows // 2 * (columns // 2)) for (h, w), (rows, columns) in latents]
    return context_parallel_problem(
        degree, shape.num_attention_heads, transformer.text_tokens, buckets
    )


def too_large(
    name: str, needed: int, transformer: Transformer, sizes: Sequence[tuple[int, int]], limit: int
) -> list[str]:
    """A warning when a stage does not fit, with the first change of settings that makes it fit."""
    if needed <= limit:
        return []
    text = f"{name}: needs {needed / GIB:.1f} GiB of {limit / GIB:.1f} GiB"
    # Only the DiT stages have settings enough to be worth a search.
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
    gpus = transformer.gpus
    changes: list[str] = []
    # A change that does not suffice stays while the next is tried. More GPUs come last, because
    # they are the only change that costs hardware.
    wanted = (
        ("precision", "bf16"),
        ("gradient_checkpointing", "blocks"),
        # Never lowered.
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
    for degree in (1, *_DEGREES):
        more = changes + [f"runtime.context_parallel_degree: {degree}"] * (degree > 1)
        divided = _with_degree(transformer, degree)
        # A degree that the engine would refuse is no advice.
        if _undivided(transformer, sizes, degree) is not None:
            continue
        ranks = gpus
        while ranks < _MOST_GPUS:
            ranks *= 2
            if dit_memory(stage, divided, sizes, ranks).total <= limit:
                return "set " + ", ".join([*more, f"runtime.processes: {ranks}"])
    # What is left here is what each GPU holds whole.
    memory = dit_memory(stage, transformer, sizes, _MOST_GPUS)
    return (
        f"no number of GPUs helps: {_MOST_GPUS} of them with "
        f"{', '.join(changes) or 'these settings'} would still need {memory.total / GIB:.1f} GiB "
        "each for weights, activations and buffers; choose a GPU with more memory"
    )
