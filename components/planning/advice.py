"""What a planned run would fail on, and which settings to change.

Advice is tried before it is given: the changes are applied to the settings, whose own checks run,
and the stage is planned again under them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from components.models.loading.memory_modes import parse_memory
from components.planning.memory import GIB
from components.planning.stage_memory import Size, generate_bytes, stage_memory, verdict_of
from components.planning.transformer import Transformer
from components.settings.schema import SettingsError, parse_settings
from components.settings.training import DitStageSettings
from components.training.dit.block_compilation import compilation_problem
from components.training.sharded.context_parallel import context_parallel_problem

# Where the search ends: by then little but what no GPU shares is left.
_MOST_GPUS = 1024
# Degrees of context parallelism to try, smallest first: a degree takes GPUs from the batch.
_DEGREES = (2, 4, 8)
# Ways to sample, those first that change no picture and cost the least time.
_SAMPLING = ("text-first", "text-first,vae-tiling", "model-offload", "model-offload,vae-tiling")

Changes = Mapping[str, Any]
"""Values by dotted name, as in a settings file."""


def changed(transformer: Transformer, changes: Changes) -> Transformer | None:
    """The same networks under changed settings; None where the settings refuse them."""
    values = transformer.settings.model_dump(mode="json")
    for name, value in changes.items():
        *sections, key = name.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[key] = value
    try:
        return replace(transformer, settings=parse_settings(values))
    except SettingsError:
        return None


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
    vae = settings.vae
    if vae.batch_size % transformer.gpus:
        found.append(
            f"vae: batch_size {vae.batch_size} is not a multiple of the {transformer.gpus} "
            f"processes; set it to {-(-vae.batch_size // transformer.gpus) * transformer.gpus}"
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


def too_large(name: str, transformer: Transformer, sizes: Sequence[Size], limit: int) -> list[str]:
    """A warning when a stage does not fit, with the first change of settings that makes it fit."""
    taken = stage_memory(name, transformer, sizes)
    if taken.gpu_bytes <= limit:
        return []
    shared = f" ({taken.processes} processes on a GPU)" if taken.processes > 1 else ""
    text = f"{name}: needs {taken.gpu_bytes / GIB:.1f} GiB{shared} of {limit / GIB:.1f} GiB"
    if name == "generate":
        return [f"{text}; {_sampling_cure(transformer, limit)}"]
    open_cure = ""
    tried: Changes = {}
    for tried in _candidates(name, transformer):
        advised = changed(transformer, tried)
        # What the engine would refuse is no advice, nor what breaks another stage.
        if advised is None or set(refusals(advised, sizes)) - set(refusals(transformer, sizes)):
            continue
        planned = stage_memory(name, advised, sizes)
        verdict = planned.verdict(limit)
        cure = f"set {_as_text(tried)} ({planned.gpu_bytes / GIB:.1f} GiB)"
        if verdict == "fits":
            return [f"{text}; {cure}"]
        if verdict == "open" and not open_cure:
            open_cure = f"{cure}, which is close"
    return [f"{text}; {open_cure or _no_cure(name, transformer, sizes, tried)}"]


def _as_text(changes: Changes) -> str:
    return ", ".join(f"{name}: {str(value).lower()}" for name, value in changes.items())


def _candidates(name: str, transformer: Transformer) -> Iterator[Changes]:
    """Changes to try, each with those before it: what costs least first."""
    settings = transformer.settings
    stage: Any = getattr(settings, name, None)
    wanted: tuple[tuple[str, Any], ...] = {
        "latents": (("runtime.encoders_per_gpu", 1), ("latents.batch_size", 1)),
        "text_embeddings": (("runtime.encoders_per_gpu", 1),),
        "vae": (
            ("vae.gradient_checkpointing", True),
            *(
                ("vae.micro_batch_size", n)
                for n in (8, 4, 2, 1)
                if n < settings.vae.micro_batch_size
            ),
        ),
    }.get(name, ())
    if name.startswith("dit_"):
        wanted = (
            (f"{name}.precision", "bf16"),
            (f"{name}.gradient_checkpointing", "blocks"),
            # Never lowered.
            (f"{name}.zero_stage", max(2, stage.zero_stage)),
            (f"{name}.micro_batch_size", 1),
            (f"{name}.ema_device", "cpu"),
            (f"{name}.zero_stage", offered_zero_stages()[-1]),
        )
    changes: dict[str, Any] = {}
    for key, value in wanted:
        section, _, leaf = key.partition(".")
        if changes.get(key, getattr(getattr(settings, section), leaf)) == value:
            continue
        # A change that does not suffice stays while the next is tried; a later value replaces an
        # earlier one of the same setting.
        changes.pop(key, None)
        changes[key] = value
        yield dict(changes)
    if not name.startswith("dit_"):
        return
    # More GPUs come last, because they are the only change that costs hardware.
    for degree in (1, *_DEGREES):
        divided = {"runtime.context_parallel_degree": degree} if degree > 1 else {}
        processes = settings.runtime.processes
        while processes * settings.runtime.nodes < _MOST_GPUS:
            processes *= 2
            yield changes | divided | {"runtime.processes": processes}


def _no_cure(name: str, transformer: Transformer, sizes: Sequence[Size], tried: Changes) -> str:
    """What is left where nothing helps."""
    if not name.startswith("dit_"):
        least = changed(transformer, tried) or transformer
        needed = stage_memory(name, least, sizes).gpu_bytes
        with_them = f" with {_as_text(tried)}" if tried else ""
        return (
            f"no setting helps: it still needs {needed / GIB:.1f} GiB{with_them}; choose a larger "
            "GPU"
        )
    stage: DitStageSettings = getattr(transformer.settings, name)
    kept = {key: value for key, value in tried.items() if key.startswith(f"{name}.")}
    least = changed(transformer, kept) or transformer
    needed = stage_memory(name, least, sizes).gpu_bytes
    return (
        f"no number of GPUs that global_batch_size {stage.global_batch_size} divides over helps: "
        f"{transformer.gpus} with {_as_text(kept) or 'these settings'} need {needed / GIB:.1f} GiB "
        "each; raise global_batch_size for more GPUs, train an adapter, or choose a GPU with more "
        "memory"
    )


def _sampling_cure(transformer: Transformer, limit: int) -> str:
    """A mode of `ultraflux generate --memory` under which the largest picture fits."""
    needed = {modes: generate_bytes(transformer, parse_memory(modes)) for modes in _SAMPLING}
    for wanted, note in (("fits", ""), ("open", ", which is close")):
        for modes, count in needed.items():
            if verdict_of(count, 1, limit) == wanted:
                return f"use ultraflux generate --memory {modes} ({count / GIB:.1f} GiB){note}"
    modes = min(needed, key=needed.__getitem__)
    return (
        f"no mode of ultraflux generate --memory fits: {modes} needs "
        f"{needed[modes] / GIB:.1f} GiB; choose a larger GPU"
    )
