"""Which processes are this clone's: those that work in its folder.

A copied folder has the notes of the original's servers and workers, whose numbers and names are
right. A moved one takes its processes along: the system names their folder anew.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

from flows.tracking.tier import services_dir


def works_in(process: psutil.Process, root: Path) -> bool:
    """Whether a server or a worker works in this clone and in no other, one inside it included.

    Raises:
        psutil.Error: it has ended, or is not ours to look at.
    """
    folder = Path(process.cwd())
    # PostgreSQL goes to its data.
    return folder == root.resolve() or folder.is_relative_to(services_dir(root.resolve()))


def daemons_in(root: Path) -> list[tuple[psutil.Process, list[str]]]:
    """Leaders of sessions that work in this clone, in the order of their start.

    Returns:
        Each with its command line. The server of one run leads none: its launcher does.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == process.pid and works_in(process, root):
                found.append((process.create_time(), process.pid, process, process.cmdline()))
    return [(process, command) for _, _, process, command in sorted(found, key=lambda one: one[:2])]
