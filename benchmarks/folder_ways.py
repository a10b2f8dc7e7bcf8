"""Ways to fill a folder, measured in alternation: ours against the fastest of the others."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Way = Callable[[Path], None]


def seconds_in_alternation(
    ways: Mapping[str, Way],
    rounds: int,
    folder: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way by round, each time into an empty folder; the order turns.

    Args:
        ways: what is measured, by name.
        rounds: that count; one before them warms files and allocators.
        folder: holds the empty ones.
        clock: wall time, or `time.process_time`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                begin = clock()
                ways[name](Path(out))
                seconds[name].append(clock() - begin)
    return {name: times[1:] for name, times in seconds.items()}


def over_fastest(seconds: Mapping[str, list[float]], ours: str) -> tuple[float, ...]:
    """Time of ours over that of the fastest other way, of each round."""
    others = [times for name, times in seconds.items() if name != ours]
    fastest = [min(times) for times in zip(*others, strict=True)]
    return tuple(mine / other for mine, other in zip(seconds[ours], fastest, strict=True))
