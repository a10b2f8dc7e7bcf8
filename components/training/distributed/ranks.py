"""A process of a training run: process group, determinism, DeepSpeed engine.

DeepSpeed is imported inside functions: it takes seconds (mostly MLflow, through its autotuner).
The accelerator name must be in the environment before that import, so `training_environment`
comes first in every process that trains.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.settings.runtime import RuntimeSettings
from components.settings.training import DitStageSettings
from components.training.distributed.optimizers import build_optimizer, offload_configuration

T = TypeVar("T")
Device = Literal["cpu", "cuda"]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
HEARTBEATS = "ULTRAFLUX_HEARTBEATS"
"""Names a folder with a file per rank, touched when the rank gets on."""
_BEAT_EVERY_S = 1.0
# Upper limit of DeepSpeed's communication buckets in elements (its default is 5e8).
BUCKET_ELEMENTS = 200_000_000


def _no_beat() -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run; all methods are collective."""

    rank: int
    world_size: int
    device: torch.device
    beat: Callable[[], None] = _no_beat
    """Called after every meeting with the other ranks."""
    # Neighbouring numbers are, as a rule, processes of one node, where exchanging tokens is cheap.
    context_degree: int = 1
    """So many neighbouring ranks work on the same samples (`sharded.context_parallel`);
    divides `world_size`."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes logs and results."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the samples this process works on."""
        return self.rank // self.context_degree

    @property
    def data_world_size(self) -> int:
        """Into how many shares samples are divided."""
        return self.world_size // self.context_degree

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()
            self.beat()

    def gather(self, value: T) -> list[T]:
        """Values of all ranks in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        # Pickled, hence for validation and grids; a step uses `gather_samples`.
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value)
        self.beat()
        return everyone

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For every flag, whether it is set on any rank; the same answer on every rank."""
        if self.world_size == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        self.beat()
        return tuple(bool(value) for value in values.tolist())

    def gather_samples(self, values: Tensor) -> Tensor:
        """Columns of all samples, (rows, all samples) on the CPU, in rank order, on every rank.

        One collective on the device, without pickling: it runs at every step.

        Args:
            values: (rows, samples of this rank), of one shape on all ranks.
        """
        if self.world_size == 1:
            return values.cpu()
        everyone = values.new_empty(self.world_size * values.shape[0], values.shape[1])
        dist.all_gather_into_tensor(everyone, values.contiguous())
        self.beat()
        # Ranks that share samples have the same values.
        parts = everyone.unflatten(0, (self.world_size, -1))[:: self.context_degree]
        return parts.transpose(0, 1).flatten(1).cpu()


def collective_timeout(runtime: RuntimeSettings) -> timedelta:
    """How long a rank waits for the others."""
    return timedelta(minutes=runtime.collective_timeout_minutes)


def training_environment(device: Device, ranks_on_this_host_only: bool = True) -> dict[str, str]:
    """Environment that a training process needs before it imports DeepSpeed.

    Args:
        device: where the model trains.
        ranks_on_this_host_only: keep gloo on the loopback interface (no address look-ups, and
            nothing listens on the network).
    """
    environment: dict[str, str] = {"DS_ACCELERATOR": device}
    if device == "cuda":
        # cuBLAS is deterministic only with a fixed workspace.
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # The interface is "lo" on Linux and "lo0" on macOS.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if ranks_on_this_host_only and loopback:
        environment["GLOO_SOCKET_IFNAME"] = loopback[0]
    return environment


class Heartbeat:
    """Touches a file, at most once a second, so that a launcher sees that a rank gets on."""

    def __init__(self, file: Path) -> None:
        """Touch `file` now."""
        self._file = file
        file.touch()
        self._last = time.monotonic()

    def __call__(self) -> None:
        """This rank has got on."""
        now = time.monotonic()
        if now - self._last >= _BEAT_EVERY_S:
            self._file.touch()
            self._last = now


@contextmanager
def open_ranks(
    device: Device, timeout: timedelta = COLLECTIVE_TIMEOUT, context_degree: int = 1
) -> Iterator[Ranks]:
    """Join the process group (that of torchrun where there is one, else of this process alone).

    A lone process uses a store in memory, so no port is opened.

    Args:
        device: where the model trains.
        timeout: how long a rank waits for the others before it fails.
        context_degree: so many neighbouring ranks share each sample.
    """
    # On several nodes gloo has to find the network by itself.
    here = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")
    for name, value in training_environment(device, here).items():
        # What a launcher has set stays.
        os.environ.setdefault(name, value)
    # DeepSpeed insists on a local rank even where nothing was launched.
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if device == "cuda" else "gloo"
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        # Before the group is made: NCCL takes the device that is current.
        torch.cuda.set_device(local_rank)
    store = dist.HashStore() if world_size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    folder = os.environ.get(HEARTBEATS)
    beat = Heartbeat(Path(folder) / f"{rank:05d}") if folder else _no_beat
    target = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    try:
        yield Ranks(rank, world_size, target, beat, context_degree)
    finally:
        _leave_ranks()


def _leave_ranks() -> None:
    """Destroy the process group, and DeepSpeed's references to it where DeepSpeed was used."""
    if "deepspeed" in sys.modules:
        from deepspeed import comm

        if comm.is_initialized():
            comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def deterministic_torch(threads: int) -> Iterator[None]:
    """Deterministic kernels and a fixed number of threads inside the block.

    On CUDA some kernels have no deterministic form; torch then warns instead of failing.
    """
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    # A sum is cut into as many parts as there are threads, which changes its last bits.
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def exit_with_parent() -> None:
    """End this process when the pipe at its standard input closes: its launcher is gone.

    Without a pipe (a terminal, /dev/null) there is nothing to watch. torchrun is ended as well, so
    that it does not restart the ranks.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def watch() -> None:
        # Nothing is ever sent. The read returns when the last writing end is closed, which the
        # system does however the launcher ended.
        while os.read(0, 4096):
            pass
        # Asked again, since after torchrun's end its number may be another process's.
        if torchrun is not None and os.getppid() == torchrun:
            os.kill(torchrun, signal.SIGTERM)
        # `sys.exit` would end this thread only, and the main one may stand in a collective.
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="exit-with-parent").start()


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
    groups = world_size // context_degree
    share = settings.micro_batch_size * groups
    if settings.global_batch_size % share:
        counted = "processes" if context_degree == 1 else "groups of processes"
        raise ValueError(
            f"global_batch_size {settings.global_batch_size} must be a multiple of "
            f"micro_batch_size {settings.micro_batch_size} times {groups} {counted}"
        )
    bucket = max(1024, min(BUCKET_ELEMENTS, parameters))
    return {
        # DeepSpeed counts a sample once for every process that works on it.
        "train_batch_size": settings.global_batch_size * context_degree,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.global_batch_size // share,
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

    Call inside `open_ranks`. Returns a `deepspeed.DeepSpeedEngine`; its learning rate is set by
    the trainer at every step.
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
    if settings.zero_stage == 3:
        _divide_parameters(model, settings, configuration)
    optimizer = build_optimizer(model.parameters(), settings)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=configuration,
        # The group of `open_ranks`, which has the time limit of the settings.
        dist_init_required=False,
    )
    if settings.zero_stage == 0:
        _clip_with_norm(engine, settings.max_grad_norm)
    for name, values in exact.items():
        owner, _, leaf = name.rpartition(".")
        # Replaced and not copied into: the engine's buffer has the dtype that rounds.
        setattr(engine.module.get_submodule(owner), leaf, values.to(ranks.device))
    return engine


def _divide_parameters(
    model: nn.Module, settings: DitStageSettings, configuration: dict[str, Any]
) -> None:
    """Divide the weights over the ranks one by one, so that no device ever holds all of them."""
    import deepspeed

    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    deepspeed.init_distributed(dist_init_required=False)
    deepspeed.zero.Init(module=model, config_dict_or_path=configuration, dtype=dtype)


def _clip_with_norm(engine: Any, max_norm: float) -> None:
    """Without ZeRO the engine clips float32 gradients but forgets their norm: keep it."""

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm)
        # Where `get_global_grad_norm` looks; a ZeRO optimizer would have set it.
        engine._global_grad_norm = float(norm)

    engine.clip_fp32_gradients = clip
