"""What a command and all that it starts use, read from /proc (Linux)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PAGE, _TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One reading of a process."""

    parent: int
    own_s: float
    """CPU seconds."""
    cpu_s: float
    """The same with those of the children that it has waited for."""
    resident: int
    """Bytes; pages that it shares with others count in each of them."""


def command_environment(clone: Path) -> dict[str, str]:
    """The environment of a command in a clone: its modules, compiled once and not by each start."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return environment | {"PYTHONPATH": str(clone)}


def processes() -> dict[int, Process]:
    """Every process that there is."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks = [int(value) for value in values[11:15]]
        resident = int(values[21]) * _PAGE
        own_s, cpu_s = sum(ticks[:2]) / _TICKS, sum(ticks) / _TICKS
        found[int(status.parent.name)] = Process(int(values[1]), own_s, cpu_s, resident)
    return found


def family(root: int, known: dict[int, Process]) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for pid, process in known.items():
        children.setdefault(process.parent, []).append(pid)
    found = [root] if root in known else []
    # The list grows while it is read.
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def words(pid: int) -> list[str]:
    """Command line of a process, or the title that it has given itself; empty if it has gone."""
    try:
        # A title is one string with spaces.
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").split()
    except OSError:
        return []


def readings(every_s: float, stop: threading.Event) -> Iterator[dict[int, Process]]:
    """All processes, again and again until `stop` is set."""
    while not stop.wait(every_s):
        yield processes()


def peak_of_tree(root: int, stop: threading.Event, found: list[int]) -> None:
    """Append the largest sum of resident bytes of a process and its descendants."""
    largest = 0
    for known in readings(0.2, stop):
        largest = max(largest, sum(known[pid].resident for pid in family(root, known)))
    found.append(largest)
