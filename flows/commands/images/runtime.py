"""`ultraflux evaluate runtime`: seconds and memory per picture, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.evaluation.suites.runtime_suite import Timing
    from components.evaluation.suites.suites import SuiteItem
    from components.evaluation.suites.system import Sampling, System


def parse_sizes(texts: Sequence[str] | None) -> tuple[tuple[int, int], ...]:
    """(height, width) of each WIDTHxHEIGHT; the suite's own sizes where there is none.

    Raises:
        ValueError: another form, or an edge that is no multiple of 16.
    """
    from components.evaluation.suites.suites import RUNTIME_SIZES

    sizes = []
    for text in texts or ():
        width, _, height = text.partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise ValueError(f"--size {text}: expected WIDTHxHEIGHT, such as 4096x2048")
        if int(width) % 16 or int(height) % 16 or not int(width) * int(height):
            raise ValueError(f"--size {text}: both edges must be multiples of 16 px")
        sizes.append((int(height), int(width)))
    return tuple(dict.fromkeys(sizes)) or RUNTIME_SIZES


def time_and_show(
    systems: Sequence[System],
    items: Sequence[SuiteItem],
    sampling: Sampling,
    out: Path,
    *,
    warm_up: int,
    repeats: int,
) -> tuple[dict[str, float], list[str]]:
    """Time the systems, write `runtime.json` below `out`, print the table.

    Returns:
        The numbers by name, and a line for everything that could not be timed.
    """
    from dataclasses import asdict

    from components.evaluation.suites.runtime_suite import (
        runtime_metrics,
        time_systems,
        write_runtime,
    )

    timings, failed = time_systems(
        systems, items, warm_up=warm_up, repeats=repeats, device=sampling.device
    )
    path = out / "runtime.json"
    asked = {"warm_up": warm_up, "repeats": repeats, "sampling": asdict(sampling)}
    write_runtime(timings, failed, sampling.device, path, **asked)
    _show(timings, sampling.device)
    print(f"Timings: {path}")
    problems = [f"{name}: {reason}" for name, reason in failed.items()]
    problems += [f"{t.system} at {t.size}: {t.error}" for t in timings if t.error is not None]
    return runtime_metrics(timings), problems


def _show(timings: Sequence[Timing], device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from components.evaluation.suites.runtime_suite import describe_machine

    described = describe_machine(device)
    threads = f"{described['torch_threads']} of {described['cpus']} cores"
    where = described.get("gpu") or f"{described['cpu']}, {threads}"
    console = Console()
    console.print(
        f"{where}; torch {described['torch']}; load average {described['load_average']}",
        markup=False,
        highlight=False,
    )
    table = Table(title="Seconds and memory per picture", title_justify="left")
    table.add_column("system")
    memory = "peak GiB (GPU)" if device.startswith("cuda") else "peak GiB (resident)"
    for column in ("size", "s / picture", "min to max", "pictures / s", memory, "n"):
        table.add_column(column, justify="right")
    for timing in timings:
        if not timing.seconds:
            table.add_row(timing.system, timing.size, "-", "-", "-", "-", "0")
            continue
        table.add_row(
            timing.system,
            timing.size,
            f"{timing.median_s:.3g}",
            f"{min(timing.seconds):.3g} to {max(timing.seconds):.3g}",
            f"{1 / timing.median_s:.3g}",
            f"{timing.peak_bytes / 2**30:.2f}",
            str(len(timing.seconds)),
        )
    console.print(table)
