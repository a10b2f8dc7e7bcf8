"""A process of a training run: process group, environment, determinism.

The accelerator name must be in the environment before DeepSpeed is imported, so
`training_environment` comes first in every process that trains.
"""

from __future__ import annotations

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
from torch import Tensor

from components.settings.runtime import Determinism, RuntimeSettings

T = TypeVar("T")
Device = Literal["cpu", "cuda"]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
HEARTBEATS = "ULTRAFLUX_HEARTBEATS"
"""Names a folder with a file per rank, touched when the rank gets on."""
_BEAT_EVERY_S = 1.0


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


class NotDeterministic(ValueError):
    """An operation has no deterministic kernel on this device."""


# The words with which torch refuses such an operation.
_REFUSED = "does not have a deterministic implementation"


@contextmanager
def deterministic_torch(threads: int, determinism: Determinism = "bitwise") -> Iterator[None]:
    """A fixed number of threads inside the block, and deterministic kernels if they are asked for.

    `bitwise` is strict on every device: told to warn only, torch takes the other kernels for the
    backward pass of attention on CUDA, and says so once.

    Raises:
        NotDeterministic: `bitwise`, and the block calls what has no deterministic kernel.
    """
    # Its attribute is made by a class that stands in for the module.
    filling: Any = torch.utils.deterministic
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        filling.fill_uninitialized_memory,
    )
    # A sum is cut into as many parts as there are threads, which changes its last bits.
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(determinism == "bitwise")
    # Else every new buffer is written with NaN first. Reading one before it is written is a fault
    # whatever it holds, and costs a pass over memory.
    filling.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as problem:
        if _REFUSED not in str(problem):
            raise
        operation = str(problem).split(_REFUSED)[0].strip()
        raise NotDeterministic(
            f"{operation} has no deterministic kernel on this device: set runtime.determinism to "
            "fast (results then differ from run to run by rounding)"
        ) from problem
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        filling.fill_uninitialized_memory = before[3]


def described_determinism(runtime: RuntimeSettings) -> str:
    """What a run promises about its bytes, and where that was tested; one line."""
    if runtime.determinism == "fast":
        return "fast: kernels may differ from run to run, so results differ by rounding"
    tested = "tested on CPU" if runtime.device == "cpu" else "not measured on CUDA"
    return f"bitwise: the same bytes after a kill, on one kind of machine ({tested})"


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
