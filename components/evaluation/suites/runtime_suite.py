"""How long a system takes for a picture and how much memory, at fixed sizes.

Every system is timed in a process of its own, so that none pays for what another left in memory.
The weights are loaded before the clock starts; text encoding, denoising and decoding are timed,
saving is not. Pictures of the warm-up, which pay for compilation and first allocations, are
counted apart.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from components.evaluation.suites.step_clock import step_ends, synchronise
from components.evaluation.suites.suites import SuiteItem
from components.evaluation.suites.system import System
from components.files.weight_folders import WeightsMissing
from components.files.whole_files import write_text

_GIB = 2**30
Paint = Callable[[SuiteItem], Image.Image]


@runtime_checkable
class Paintable(Protocol):
    """A system that can be loaded once and asked for single pictures."""

    @property
    def name(self) -> str:
        """As in tables."""
        ...

    def painter(self) -> Paint:
        """Load everything; what is returned makes one picture.

        Raises:
            ValueError: the weights are missing, or do not load.
        """
        ...


@dataclass(frozen=True)
class Timing:
    """One system at one size."""

    system: str
    height: int
    width: int
    load_s: float | None = None
    """Of the weights, once per system."""
    warm_up_s: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    """Of each timed picture, in order."""
    peak_bytes: int = 0
    """While pictures of this size were made, weights included: of allocated CUDA memory, or of the
    process's resident set (Linux; 0 where the system does not tell)."""
    error: str | None = None
    step_s: tuple[float, ...] = ()
    """Of each denoising step of the timed pictures but the first of each, which no step precedes;
    empty where the system shows no scheduler."""

    @property
    def median_s(self) -> float:
        """Seconds per picture; NaN where none was made."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def size(self) -> str:
        """As width x height."""
        return f"{self.width}x{self.height}"


def describe_machine(device: str) -> dict[str, str]:
    """Processor or GPU, and the versions that decide its speed."""
    import torch

    described = {
        "device": device,
        "cpu": _cpu_name(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "torch_threads": str(torch.get_num_threads()),
        "load_average": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = str(torch.version.cuda)
    return described


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def clear_peak(device: str) -> None:
    """Begin to look for a new peak of memory."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        # Refused in some containers: the mark then holds since the process began, an upper bound.
        return


def peak_bytes(device: str) -> int:
    """Since `clear_peak`; see `Timing.peak_bytes`."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _timed(paint: Paint, item: SuiteItem, device: str) -> float:
    start = time.perf_counter()
    paint(item)
    synchronise(device)
    return time.perf_counter() - start


def time_pictures(
    paint: Paint, item: SuiteItem, system: str, *, warm_up: int, repeats: int, device: str
) -> Timing:
    """Time the same picture again and again; a failure is an entry, not an exception.

    Args:
        paint: makes one picture.
        item: prompt, size and seed.
        system: its name.
        warm_up: pictures before the timed ones, at least 0.
        repeats: timed pictures, at least 1.
        device: whose memory is looked at, such as "cpu" or "cuda:0".
    """
    clear_peak(device)
    first: list[float] = []
    seconds: list[float] = []
    steps: list[float] = []
    error = None
    try:
        first += (_timed(paint, item, device) for _ in range(warm_up))
        for _ in range(repeats):
            with step_ends(paint, device) as ends:
                seconds.append(_timed(paint, item, device))
            steps += (after - before for before, after in pairwise(ends))
    except (RuntimeError, ValueError, MemoryError) as problem:
        # RuntimeError: also torch's out-of-memory errors; another size may still fit.
        error = " ".join(str(problem).split()) or type(problem).__name__
    return Timing(
        system,
        item.height,
        item.width,
        warm_up_s=tuple(first),
        seconds=tuple(seconds),
        peak_bytes=peak_bytes(device),
        error=error,
        step_s=tuple(steps),
    )


def _time_system(
    system: Paintable, items: Sequence[SuiteItem], warm_up: int, repeats: int, device: str
) -> list[Timing]:
    start = time.perf_counter()
    paint = system.painter()
    load_s = time.perf_counter() - start
    return [
        replace(
            time_pictures(
                paint, item, system.name, warm_up=warm_up, repeats=repeats, device=device
            ),
            load_s=load_s,
        )
        for item in items
    ]


def time_systems(
    systems: Sequence[System],
    items: Sequence[SuiteItem],
    *,
    warm_up: int = 1,
    repeats: int = 3,
    device: str = "cpu",
) -> tuple[list[Timing], dict[str, str]]:
    """Time every system at every size, one after another.

    Args:
        systems: with distinct names.
        items: one per size, from `suites.runtime_items`.
        warm_up: untimed pictures per system and size.
        repeats: timed pictures per system and size.
        device: where the systems were told to run.

    Returns:
        Timings in order, and why systems could not be timed at all, by name.
    """
    timings: list[Timing] = []
    failed: dict[str, str] = {}
    for system in systems:
        if not isinstance(system, Paintable):
            failed[system.name] = (
                "not timed: pictures that exist, and commands (whose start would be timed), have "
                "no time per picture; give weights, such as diffusers:FOLDER"
            )
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            task = process.submit(_time_system, system, items, warm_up, repeats, device)
            try:
                timings += task.result()
            except BrokenProcessPool:
                failed[system.name] = "the process was killed, perhaps for want of memory"
            except (WeightsMissing, ValueError, RuntimeError) as problem:
                failed[system.name] = " ".join(str(problem).split())
    return timings, failed


def runtime_metrics(timings: Sequence[Timing]) -> dict[str, float]:
    """`<system>.<width>x<height>.<number>` of everything that was timed."""
    out: dict[str, float] = {}
    for timing in timings:
        if not timing.seconds:
            continue
        prefix = f"{timing.system}.{timing.size}"
        out |= {
            f"{prefix}.seconds_per_image": timing.median_s,
            f"{prefix}.seconds_min": min(timing.seconds),
            f"{prefix}.seconds_max": max(timing.seconds),
            f"{prefix}.images_per_second": 1.0 / timing.median_s,
            f"{prefix}.peak_gib": timing.peak_bytes / _GIB,
            f"{prefix}.peak_gb": timing.peak_bytes / 1e9,
            f"{prefix}.n": float(len(timing.seconds)),
        }
        if timing.step_s:
            out[f"{prefix}.seconds_per_step"] = statistics.median(timing.step_s)
    return out


def write_runtime(
    timings: Sequence[Timing], failed: dict[str, str], device: str, path: Path, **asked: Any
) -> None:
    """One JSON file: machine, what was asked for, every second that was measured.

    Args:
        timings: from `time_systems`.
        failed: from `time_systems`.
        device: where the systems ran.
        path: of the file; its folder is created.
        **asked: further settings that belong to the numbers, such as the steps.
    """
    described = {
        "protocol": "runtime/v1",
        "machine": describe_machine(device),
        "asked": asked,
        "timings": [
            {
                "system": timing.system,
                "size": timing.size,
                "load_s": timing.load_s,
                "warm_up_s": list(timing.warm_up_s),
                "seconds": list(timing.seconds),
                "step_s": list(timing.step_s),
                "peak_bytes": timing.peak_bytes,
                "error": timing.error,
            }
            for timing in timings
        ],
        "failed_systems": failed,
        "metrics": runtime_metrics(timings),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(described, indent=2, allow_nan=False) + "\n")
