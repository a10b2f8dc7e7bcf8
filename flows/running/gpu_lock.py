"""GPUs of this machine, each for one stage at a time.

A device is taken by an exclusive `flock` on a file of its own, outside any clone: every clone and
user of the machine meets there. The kernel gives the lock back when the last process that holds it
is gone, however it went, so nothing has to be cleaned up after a kill. The stage's process takes
its devices itself, so `dvc repro`, `ultraflux run` and workers are all bound by it.

What counts as free is also asked of the driver: a device whose memory somebody else uses without
this lock is passed over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.files.holder_locks import try_lock
from components.settings.bad_input import BadInput
from components.telemetry.last_words import last_words

COUNT_VARIABLE = "ULTRAFLUX_GPU_COUNT"
"""Number of devices, for machines whose driver cannot be asked (and for tests)."""
LOCKS_VARIABLE = "ULTRAFLUX_GPU_LOCKS"
"""Folder of the lock files, one for the whole machine."""
WAITING_VARIABLE = "ULTRAFLUX_GPU_WAITING"
"""Names a file that exists while a stage waits for devices: its time limit stands still."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_S = 1.0
QUERY_TIMEOUT_S = 60.0


class GpusMissing(BadInput):
    """There are not as many GPUs as a stage needs, or none came free in time; one line."""


@dataclass(frozen=True)
class Gpu:
    """A device of this machine."""

    index: str
    """What CUDA_VISIBLE_DEVICES calls it."""
    identity: str
    """Name that stays when devices are numbered anew."""
    free_fraction: float | None
    """Share of its memory that nobody uses, 0 to 1; None: unknown."""


def machine_gpus() -> list[Gpu]:
    """Devices of this machine that this process may use.

    Raises:
        GpusMissing: `nvidia-smi` is there and fails, or ULTRAFLUX_GPU_COUNT is no number.
    """
    count = os.environ.get(COUNT_VARIABLE)
    if count is not None:
        if not count.isdigit():
            raise GpusMissing(f"{COUNT_VARIABLE} = {count}: expected a number of devices")
        found = [Gpu(str(index), f"index-{index}", None) for index in range(int(count))]
    else:
        found = _from_driver()
    # A scheduler (Slurm, Kubernetes) has assigned devices already; the others are not ours to lock.
    allowed = os.environ.get(VISIBLE)
    if allowed is None:
        return found
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    return [gpu for gpu in found if gpu.index in names or gpu.identity in names]


def _from_driver() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=index,uuid,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=QUERY_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise GpusMissing(f"nvidia-smi does not answer within {QUERY_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise GpusMissing(f"nvidia-smi: {last_words(done.stdout + done.stderr)}")
    return parse_query(done.stdout)


def parse_query(text: str) -> list[Gpu]:
    """Devices of `nvidia-smi --query-gpu=index,uuid,memory.total,memory.used` (MiB) as CSV."""
    devices = []
    for line in text.splitlines():
        index, uuid, total, used = (part.strip() for part in line.split(","))
        free = 1 - float(used) / float(total) if used.isdigit() and total.isdigit() else None
        devices.append(Gpu(index, uuid, free))
    return devices


def locks_folder() -> Path:
    """Where the lock files are: one folder for every user of the machine."""
    folder = Path(os.environ.get(LOCKS_VARIABLE) or Path(tempfile.gettempdir(), "ultraflux-gpus"))
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        # As /tmp: everybody may add a file, nobody may remove another's.
        folder.chmod(0o1777)
    return folder


def _try_lock(gpu: Gpu) -> int | None:
    """A descriptor that holds the device, None when another process has it."""
    path = locks_folder() / f"{gpu.identity}.lock"
    try:
        # Without O_CREAT: in a sticky folder Linux refuses it for files of other users.
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        os.fchmod(descriptor, 0o666)
    if not try_lock(descriptor):
        os.close(descriptor)
        return None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _take(count: int, free_fraction: float) -> dict[str, int] | None:
    """`count` devices with the descriptors that hold them; None when there are not enough.

    All or nothing: a stage that kept some while it waited for the rest could wait for a stage that
    does the same.
    """
    taken: dict[str, int] = {}
    for gpu in machine_gpus():
        if gpu.free_fraction is not None and gpu.free_fraction < free_fraction:
            continue
        descriptor = _try_lock(gpu)
        if descriptor is not None:
            taken[gpu.index] = descriptor
        if len(taken) == count:
            return taken
    for descriptor in taken.values():
        os.close(descriptor)
    return None


@contextmanager
def gpus_for(
    stage: str,
    count: int,
    *,
    free_fraction: float = 0.9,
    wait_s: float = float("inf"),
    say: Callable[[str], None] = print,
) -> Iterator[tuple[str, ...]]:
    """Hold `count` devices and show CUDA no others.

    Args:
        stage: for messages.
        count: devices; 0 runs at once and leaves CUDA_VISIBLE_DEVICES alone.
        free_fraction: share of a device's memory that has to be unused, 0 to 1.
        wait_s: how long to wait for devices that others hold, in seconds.
        say: told one line before a wait.

    Yields:
        Their names in CUDA_VISIBLE_DEVICES, which is set (with CUDA_DEVICE_ORDER=PCI_BUS_ID, the
        order in which the driver numbers them) as long as they are held.

    Raises:
        GpusMissing: the machine has fewer devices, or none came free in time.
    """
    if count == 0:
        yield ()
        return
    present = len(machine_gpus())
    if present < count:
        raise GpusMissing(
            f"{stage}: needs {_gpus(count)}, this machine has {present or 'none'} to use: run it "
            "where there are enough, or set runtime.gpus to what there is (0: no GPU)"
        )
    with ExitStack() as stack:
        taken = _wait(stage, count, free_fraction, wait_s, say)
        for descriptor in taken.values():
            stack.callback(os.close, descriptor)
        # CUDA's own order is "fastest first": without the second variable index 0 may be another
        # card than the one that is locked.
        before = {name: os.environ.get(name) for name in (VISIBLE, "CUDA_DEVICE_ORDER")}
        os.environ |= {VISIBLE: ",".join(taken), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        try:
            yield tuple(taken)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def _wait(
    stage: str, count: int, free_fraction: float, wait_s: float, say: Callable[[str], None]
) -> dict[str, int]:
    deadline = time.monotonic() + wait_s
    waiting = Path(os.environ.get(WAITING_VARIABLE) or os.devnull)
    said = False
    try:
        while (taken := _take(count, free_fraction)) is None:
            if time.monotonic() >= deadline:
                raise GpusMissing(
                    f"{stage}: no {_gpus(count)} came free within {wait_s / 60:g} minutes; "
                    f"`fuser -v {locks_folder()}/*` names who holds them"
                )
            if not said:
                say(f"{stage}: waiting for {_gpus(count)}, others hold them")
                said = True
                if WAITING_VARIABLE in os.environ:
                    waiting.touch()
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    finally:
        if said and WAITING_VARIABLE in os.environ:
            waiting.unlink(missing_ok=True)
    return taken
