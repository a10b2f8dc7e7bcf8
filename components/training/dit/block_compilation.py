"""Transformer blocks compiled one kind at a time, so that compiled training resumes exactly.

A model's blocks are few kinds repeated, so compiling a block (and not the model) takes seconds.
All sizes are symbols: one graph of a kind serves every aspect-ratio bucket. On GPUs the objective
is compiled with them; on a CPU its own loop is faster (`components.objectives.fused_snr_huber`).

Exactness needs that the code does not depend on where a run was interrupted. What a compiler
chooses can depend on the sizes that it sees first, so `compile_for_buckets` shows it all buckets in
a fixed order before the first step of every process; and nothing is chosen by timing
(`inductor.deterministic`). Equal sizes are not taken for one symbol, which would give a second
graph, and among fitting graphs torch picks the one used last. Validation and sample grids run
without compilation (`uncompiled`): their batches have other sizes, and would add graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from components.models.loading.block_compile import require_compiler

if TYPE_CHECKING:
    import torch

    from components.settings.objective import ObjectiveSettings
    from components.settings.runtime import RuntimeSettings
    from components.settings.training import DitStageSettings
    from components.training.dit.velocity import NoisedBatch

_SETTING = "runtime.compile 'blocks'"


def compilation_problem(stage: DitStageSettings, runtime: RuntimeSettings) -> str | None:
    """Why `stage` cannot be compiled, in one line; None: it can, or is not to be."""
    if runtime.compile == "none":
        return None
    # ZeRO 3 gathers weights by hooks inside the block.
    if stage.zero_stage == 3:
        return f"{_SETTING}: weights divided by zero_stage 3 cannot be compiled; use zero_stage 2"
    # Its policy decides operator by operator, and sees none inside compiled code.
    if stage.gradient_checkpointing == "selective":
        return (
            f"{_SETTING}: gradient_checkpointing 'selective' cannot see into compiled blocks; use "
            "'blocks' or 'none'"
        )
    if stage.offload_base:
        return f"{_SETTING}: offload_base exchanges weights between calls; use one of the two"
    if runtime.context_parallel_degree > 1:
        return f"{_SETTING}: use it with runtime.context_parallel_degree 1"
    return None


def check_compilation(stage: DitStageSettings, runtime: RuntimeSettings) -> None:
    """Refuse what cannot be compiled.

    Raises:
        ValueError: settings that compilation cannot be combined with, or no C++ compiler for the
            CPU's kernels.
    """
    problem = compilation_problem(stage, runtime)
    if problem is not None:
        raise ValueError(problem)
    if runtime.compile == "blocks" and runtime.device == "cpu":
        require_compiler(_SETTING)


def compile_for_buckets(
    engine: Any,
    batches: Iterable[NoisedBatch],
    guidance_scale: float,
    dtype: torch.dtype,
    objective: ObjectiveSettings | None = None,
) -> None:
    """Compile forward and backward passes now; weights, gradients and random state stay.

    Args:
        engine: DeepSpeed engine around a model on which `compile_blocks` was called.
        batches: a micro batch of each bucket, always in the same order.
        guidance_scale: as in training.
        dtype: as in training.
        objective: compiled too; None: training computes it as it is.
    """
    # Here, because the planner asks this module without torch.
    import torch

    from components.objectives.objective import objective_loss
    from components.training.dit.velocity import predict_velocity

    model = engine.module
    # One gradient is enough: its path leads back through every block, and a block's compiled
    # backward pass computes all of its gradients. `torch.autograd.grad` calls none of the hooks by
    # which DeepSpeed collects gradients.
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    with _one_graph_of_a_kind():
        # The order is part of the contract: the sizes seen first become hints of the code.
        for batch in batches:
            velocity = predict_velocity(model, batch, guidance_scale, dtype)
            loss = velocity
            if objective is not None:
                loss = objective_loss(
                    objective, velocity, batch.latents, batch.noise, batch.t, compiled=True
                )
            # Backward too: it is compiled when it first runs, and must not be by the first real
            # batch.
            torch.autograd.grad(loss.sum(), first)


@contextmanager
def _one_graph_of_a_kind() -> Iterator[None]:
    from torch._inductor import config as inductor
    from torch.fx.experimental import _config as shapes

    patch: Any = shapes.patch  # type: ignore[attr-defined]
    # Without `deterministic`, kernels would be chosen by timing, and so differ from run to run.
    with patch(use_duck_shape=False), inductor.patch(deterministic=True):
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled blocks as plain Python inside."""
    import torch

    # Nothing is thrown away: the graphs are there again after the block.
    with torch.compiler.set_stance("force_eager"):
        yield
