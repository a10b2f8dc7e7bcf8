"""What the corpus engine adds to every item: processes, pipes, shards, compression, joining.

    python benchmarks/corpus_engine.py [--items 2000] [--repeats 7]

A function that does nothing returns rows with a picture's bytes (random, as incompressible as a
JPEG). Within each run the clock starts when the engine asks for item `items / 10`, so that the
start of the worker is not in it, and stops when the joined file is there. Wall time counts, as it
does for whoever waits; the processor time of this process stands beside it, because on a busy
machine the wall time is mostly other people's. The median of the repeats is the result.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from verdicts import Verdict, conclude

from components.engine.map_items import EngineLimits, join_shards, map_items
from components.signals.candidate import CANDIDATE_SCHEMA

ROW_JPEG_BYTES = 100_000
"""About a derivative of 1024 pixels."""
LIMITS = EngineLimits(workers=1, timeout_s=60, memory_mb=1024, retries=0)


@cache
def _noise() -> bytes:
    return random.Random(0).randbytes(2 * ROW_JPEG_BYTES)


def nothing(number: int) -> dict[str, Any]:
    """A row as large as a real one, for free."""
    start = number * 7919 % ROW_JPEG_BYTES
    return {"width": number, "jpeg": _noise()[start : start + ROW_JPEG_BYTES]}


def seconds_per_item(items: int) -> tuple[float, float]:
    """(wall, processor of this process) per item of one run with one worker."""
    warm = items // 10
    clocks: list[tuple[float, float]] = []

    def numbers() -> Iterator[int]:
        for number in range(items):
            if number == warm:
                clocks.append((time.perf_counter(), time.process_time()))
            yield number

    with tempfile.TemporaryDirectory() as folder:
        shards = map_items(
            nothing,
            [f"{number:064d}" for number in range(items)],
            numbers(),
            stage="nothing",
            key={},
            schema=CANDIDATE_SCHEMA,
            state_dir=Path(folder),
            limits=LIMITS,
        )
        join_shards(shards, CANDIDATE_SCHEMA, Path(folder) / "all.parquet")
        wall, processor = time.perf_counter(), time.process_time()
    return (wall - clocks[0][0]) / (items - warm), (processor - clocks[0][1]) / (items - warm)


def main() -> int:
    """Measure and print; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    runs = [seconds_per_item(options.items) for _ in range(options.repeats)]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"{options.items} items of {ROW_JPEG_BYTES // 1000} kB, n = {options.repeats} runs"
    )
    for name, values in (
        ("wall", [wall * 1e3 for wall, _ in runs]),
        ("processor (parent)", [processor * 1e3 for _, processor in runs]),
    ):
        print(
            f"{name:20} median {statistics.median(values):.2f} ms per item, "
            f"{min(values):.2f} to {max(values):.2f}"
        )
    parents = tuple(processor * 1e3 for _, processor in runs)
    return conclude([Verdict("corpus engine: ms of the parent's processor an item", parents, 1.0)])


if __name__ == "__main__":
    sys.exit(main())
