"""`ultraflux evaluate runtime`: seconds and memory per picture, and what short cuts cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.command_line import print_json
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from components.evaluation.suites.runtime_suite import Timing
    from components.evaluation.suites.sampling_ways import Way, WayResult
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
    as_json: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """Time the systems, write `runtime.json` below `out`, print the table (or the file).

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
    if as_json:
        print_json(json.loads(path.read_text(encoding="utf-8")))
    else:
        _show(timings, sampling.device)
        print(f"Timings: {path}")
    problems = [f"{name}: {reason}" for name, reason in failed.items()]
    problems += [f"{t.system} at {t.size}: {t.error}" for t in timings if t.error is not None]
    return runtime_metrics(timings), problems


def parse_ways(texts: Sequence[str]) -> list[Way]:
    """Ways of --way; `all` is each of them alone.

    Raises:
        ValueError: an unknown one.
    """
    from components.evaluation.suites.sampling_ways import WAYS, parse_way

    names = [name for text in texts for name in (WAYS if text == "all" else [text])]
    return [parse_way(name) for name in dict.fromkeys(names)]


def compare_and_show(
    systems: Sequence[System],
    ways: Sequence[Way],
    items: Sequence[SuiteItem],
    sampling: Sampling,
    out: Path,
    *,
    as_json: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """Each way against the exact pictures: write `ways.json` below `out`, print tables (or it).

    Returns:
        The numbers by name, and a line for every system that could not be compared. A way that
        cannot run here is a row that says so, and no failure.
    """
    from dataclasses import asdict

    from components.evaluation.suites.runtime_suite import describe_machine
    from components.evaluation.suites.sampling_ways import measure_ways, ways_metrics
    from components.evaluation.suites.systems import UltraFluxSystem
    from components.files.whole_files import write_text

    tables: dict[str, list[WayResult]] = {}
    problems = []
    for system in systems:
        if not isinstance(system, UltraFluxSystem):
            problems.append(
                f"{system.name}: --way is of weights that `ultraflux generate` loads; give trained "
                "or ultraflux:FOLDER"
            )
            continue
        try:
            tables[system.name] = measure_ways(system, ways, items, device=sampling.device)
        except ValueError as problem:
            problems.append(f"{system.name}: {' '.join(str(problem).split())}")
            continue
        if not as_json:
            _show_ways(system.name, tables[system.name])
    path = out / "ways.json"
    metrics: dict[str, float] = {}
    for name, rows in tables.items():
        metrics |= ways_metrics(name, rows)
    described = {
        "protocol": "ways/v1",
        "machine": describe_machine(sampling.device),
        "sampling": asdict(sampling),
        "prompts": list(dict.fromkeys(item.prompt for item in items)),
        "ways": {
            name: [
                {
                    "way": row.way,
                    "kind": row.kind,
                    "size": row.size,
                    "error": row.error,
                    **row.metrics(),
                }
                for row in rows
            ]
            for name, rows in tables.items()
        },
    }
    write_text(path, json.dumps(described, indent=2, allow_nan=False) + "\n")
    if as_json:
        print_json(described)
    else:
        print(f"Ways: {path}")
    return metrics, problems


def _show_ways(system: str, results: Sequence[WayResult]) -> None:
    from rich.box import SIMPLE

    def number(value: float | None, digits: int) -> str:
        return "equal" if value is None else f"{value:.{digits}f}"

    console, reasons = terminal(), []
    columns = ("way", "PSNR worst", "mean", "SSIM worst", "mean", "blocks", "s")
    for size in dict.fromkeys(row.size for row in results):
        cells: list[tuple[str, ...]] = []
        for row in (row for row in results if row.size == size):
            # Approximate ways are marked before anything is measured.
            name = f"~ {row.way}" if row.kind == "approximate" else f"  {row.way}"
            if row.error is not None:
                cells.append((name, *("-",) * 6))
                reasons.append(f"{row.way} at {size}: not measured: {row.error}")
                continue
            found = row.metrics()
            cells.append(
                (
                    name,
                    number(found.get("psnr_worst_db"), 2),
                    number(found.get("psnr_mean_db"), 2),
                    number(found["ssim_worst"], 4),
                    number(found["ssim_mean"], 4),
                    f"{row.blocks_computed} of {row.blocks_total}",
                    f"{found['seconds_per_image']:.3g}",
                )
            )
        title = f"{system} at {size} against the exact pictures"
        # The way's name gives way before the numbers do.
        table = table_of(
            columns, cells, title=title, left=(0,), whole=range(1, len(columns)), folded=(0,)
        )
        table.box = SIMPLE
        console.print(table)
    prompts = max(len(row.psnr_db) for row in results)
    console.print(f"{prompts} prompts; dB; ~ approximate; blocks computed of all", markup=False)
    for reason in dict.fromkeys(reasons):
        console.print(reason, markup=False, soft_wrap=True)


def _show(timings: Sequence[Timing], device: str) -> None:
    from components.evaluation.suites.runtime_suite import describe_machine

    described = describe_machine(device)
    threads = f"{described['torch_threads']} of {described['cpus']} cores"
    where = described.get("gpu") or f"{described['cpu']}, {threads}"
    console = terminal()
    console.print(
        f"{where}; torch {described['torch']}; load average {described['load_average']}",
        markup=False,
        highlight=False,
    )
    memory = "peak GiB (GPU)" if device.startswith("cuda") else "peak GiB (resident)"
    columns = ("system", "size", "s / picture", "min to max", "pictures / s", memory, "n")
    rows = (
        (
            timing.system,
            timing.size,
            f"{timing.median_s:.3g}",
            f"{min(timing.seconds):.3g} to {max(timing.seconds):.3g}",
            f"{1 / timing.median_s:.3g}",
            f"{timing.peak_bytes / 2**30:.2f}",
            str(len(timing.seconds)),
        )
        if timing.seconds
        else (timing.system, timing.size, "-", "-", "-", "-", "0")
        for timing in timings
    )
    console.print(table_of(columns, rows, title="Seconds and memory per picture", left=(0,)))
