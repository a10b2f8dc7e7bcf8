"""The DeepSpeed engine of a stage: configuration, float32 masters, clipping.

DeepSpeed is imported inside functions: it takes seconds (mostly MLflow, through its autotuner).
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from components.models.loading.block_offload import waits_on_host
from components.models.loading.quantisation import is_quantised
from components.settings.training import DitStageSettings
from components.training.distributed.engine_limits import BUCKET_ELEMENTS
from components.training.distributed.optimizers import build_optimizer, offload_configuration
from components.training.distributed.ranks import Ranks
from components.training.sharded.weight_shards import set_master


def micro_batches_per_step(
    settings: DitStageSettings, world_size: int, context_degree: int = 1
) -> int:
    """How many micro batches each process takes one after the other.

    Raises:
        ValueError: the global batch does not divide over processes and micro batches.
    """
    groups = world_size // context_degree
    share = settings.micro_batch_size * groups
    if settings.global_batch_size % share:
        counted = "processes" if context_degree == 1 else "groups of processes"
        raise ValueError(
            f"global_batch_size {settings.global_batch_size} must be a multiple of "
            f"micro_batch_size {settings.micro_batch_size} times {groups} {counted} "
            "(runtime.processes, nodes)"
        )
    return settings.global_batch_size // share


def engine_configuration(
    settings: DitStageSettings, world_size: int, parameters: int, context_degree: int = 1
) -> dict[str, Any]:
    """DeepSpeed's configuration for one stage.

    Args:
        settings: the stage.
        world_size: number of processes.
        parameters: parameters of the model; bounds the communication buckets.
        context_degree: processes that share each sample.

    Raises:
        ValueError: the global batch does not divide over processes and micro batches.
    """
    accumulated = micro_batches_per_step(settings, world_size, context_degree)
    # Even: DeepSpeed wants buckets that NCCL can align.
    bucket = max(1024, min(BUCKET_ELEMENTS, parameters + parameters % 2))
    return {
        # DeepSpeed counts a sample once for every process that works on it.
        "train_batch_size": settings.global_batch_size * context_degree,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": settings.precision == "bf16"},
        # bfloat16 has 8 bits of mantissa: a sum of many micro batches would lose the later ones.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": settings.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Overlapping reduces in several buckets is a CUDA stream feature.
            "overlap_comm": torch.cuda.is_available(),
            # Stage 3: no small parameter stays whole on the ranks, so that each share is all of
            # the weights (the EMA is put in their place for validation).
            "stage3_param_persistence_threshold": 0,
            # DeepSpeed would replace torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
            **offload_configuration(settings),
        },
        # torch's AdamW also for offloaded states: DeepSpeed's CPU kernel needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        # The 8-bit AdamW is not on DeepSpeed's list.
        "zero_allow_untested_optimizer": True,
        # Progress is the trainer's to print.
        "steps_per_print": sys.maxsize,
    }


def initialize_engine(model: nn.Module, settings: DitStageSettings, ranks: Ranks) -> Any:
    """Wrap `model` into a DeepSpeed engine with its optimizer.

    Call inside `open_ranks`. The engine's float32 masters are the weights as they were given.
    DeepSpeed makes masters of its own rounded copy, and a rounding to bfloat16 undoes most of what
    a learning rate of 1e-6 has moved.

    Args:
        model: float32.
        settings: of the stage.
        ranks: this process.

    Returns:
        A `deepspeed.DeepSpeedEngine`; its learning rate is set by the trainer at every step.
    """
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed asks this table only whether to compile a shared-memory collective; gloo does that
    # work. Reading the table would first probe every native operator with the compiler.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # Buckets of the default size would cost a tiny model more memory than itself.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    configuration = engine_configuration(
        settings, ranks.world_size, parameters, ranks.context_degree
    )
    # The engine rounds buffers with the weights; a table of positions must stay exact, since it is
    # exported with them.
    exact = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    # Before weights are divided: which are matrices no longer shows in the parts.
    optimizer = build_optimizer(model.parameters(), settings)
    # ZeRO 3 divides on the host: no device ever holds all weights.
    device = torch.device("cpu") if settings.zero_stage == 3 else ranks.device
    given = _rounded(model, device) if settings.precision == "bf16" else {}
    if settings.zero_stage == 3:
        _divide_parameters(model, configuration)
    with _old_objects_left_alone(), _left_alone(model):
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=configuration,
            # The group of `open_ranks`, which has the time limit of the settings.
            dist_init_required=False,
        )
    for name, parameter in engine.module.named_parameters():
        if name in given:
            # Taken out, so that each tensor goes as soon as its part is copied.
            set_master(name, parameter, given.pop(name), ranks)
    if settings.zero_stage == 0:
        _clip_with_norm(engine, settings.max_grad_norm)
        if ranks.world_size == 1:
            _leave_gradients_where_they_are(engine)
    for name, values in exact.items():
        owner, _, leaf = name.rpartition(".")
        # Replaced and not copied into: the engine's buffer has the dtype that rounds.
        setattr(engine.module.get_submodule(owner), leaf, values.to(ranks.device))
    return engine


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Let the garbage collector see new objects alone.

    DeepSpeed collects each time it prints how much memory is used, four times or more in one
    start; among the millions of objects of the imported libraries each takes 0.3 s.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _rounded(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Round the weights to bfloat16 on `device`; returns the trained ones as they were.

    One by one, so that the host does not hold both copies of all on the way to a GPU.
    """
    given = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and (is_quantised(parameter) or waits_on_host(parameter)):
            # In its final form already, in 8 or 4 bits, or where its block leaves it.
            continue
        if parameter.requires_grad:
            given[name] = parameter.detach()
        parameter.data = parameter.data.to(device, torch.bfloat16)
    return given


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Inside the block no cast, move or broadcast reaches layers in 8 or 4 bits, or that wait.

    They are where they belong in their final form, and every rank has made the same base alike.
    """
    layers = [
        layer
        for layer in model.modules()
        if any(is_quantised(one) or waits_on_host(one) for one in layer.parameters(recurse=False))
    ]
    for layer in layers:
        # As DeepSpeed marks the base of its own low-rank layers, which it does not send either.
        for parameter in layer.parameters(recurse=False):
            parameter.ds_optim_param = True  # type: ignore[attr-defined]
        layer._apply = partial(_same, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer._apply
            for parameter in layer.parameters(recurse=False):
                del parameter.ds_optim_param  # type: ignore[attr-defined]


def _same(layer: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return layer


def _divide_parameters(model: nn.Module, configuration: dict[str, Any]) -> None:
    """Divide the weights over the ranks one by one."""
    import deepspeed

    dtype = next(model.parameters()).dtype
    deepspeed.init_distributed(dist_init_required=False)
    deepspeed.zero.Init(module=model, config_dict_or_path=configuration, dtype=dtype)


def _clip_with_norm(engine: Any, max_norm: float) -> None:
    """Without ZeRO the engine clips float32 gradients but forgets their norm: keep it."""

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm)
        # Where `get_global_grad_norm` looks; a ZeRO optimizer would have set it.
        engine._global_grad_norm = float(norm)

    engine.clip_fp32_gradients = clip


def _leave_gradients_where_they_are(engine: Any) -> None:
    """The sum over one process is its own gradient: no copy into a buffer and back for it.

    Weights without a gradient still get zeros, as the sum of several processes would have them:
    weight decay reaches those as well.
    """

    def sum_of_one(**_: Any) -> None:
        engine._get_gradients_for_reduction()

    engine.buffered_allreduce_fallback = sum_of_one


class UpdateGate:
    """Stands before the optimizer's update, when DeepSpeed has measured the gradient.

    A refused update leaves weights, masters and moments as they are: DeepSpeed goes through its
    step, gradients are used up, and the optimizer inside does nothing.
    """

    def __init__(self, engine: Any) -> None:
        """Let `engine` ask before it updates."""
        self._engine = engine
        self._judge: Callable[[float], str | None] | None = None
        self._update = engine.basic_optimizer.step
        self._was_asked = False
        self._reason: str | None = None
        engine.basic_optimizer.step = self._step

    def take_step(self, judge: Callable[[float], str | None]) -> tuple[float, str | None]:
        """The engine's step at the end of accumulation.

        Args:
            judge: why an update with this gradient norm must not happen; None: it may. Asked once.

        Returns:
            The gradient norm, and the reason for which nothing was updated.
        """
        self._judge, self._was_asked, self._reason = judge, False, None
        self._engine.step()
        # None means that there was nothing to measure.
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        if not self._was_asked:
            # DeepSpeed itself leaves an update out when the norm is not finite.
            self._reason = judge(norm)
        self._judge = None
        return norm, self._reason

    def _step(self, *arguments: Any, **options: Any) -> Any:
        # Called for each part of the weights; the norm is that of all.
        if self._judge is not None and not self._was_asked:
            self._was_asked = True
            wrapper = self._engine.optimizer
            norm = getattr(wrapper, "_global_grad_norm", self._engine._global_grad_norm)
            self._reason = self._judge(float(norm or 0.0))
        return None if self._reason is not None else self._update(*arguments, **options)
