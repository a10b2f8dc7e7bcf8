"""Processes that outlive the command that starts them, and which are this clone's.

Those that work in its folder are. A copied folder has the notes of the original's servers and
workers, whose numbers and names are right. A moved one takes its processes along: the system names
their folder anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from flows.records.records import write_json
from flows.tracking.tier import services_dir

STOP_TIMEOUT_S = 15.0
MARK = "ULTRAFLUX_STARTED_AS"
"""Environment variable of a server and of all that it starts: a word that was drawn for it."""


def start_detached(
    command: Sequence[str], log: Path, env: Mapping[str, str], **options: Any
) -> int:
    """Start a program that outlives this one and return its process id.

    Args:
        command: program and arguments.
        log: gets what it says, after what stands there.
        env: its environment.
        options: further arguments of `subprocess.Popen`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # A process that ignores SIGINT would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
            **options,
        )
    return process.pid


def wait_or_kill(processes: Sequence[psutil.Process]) -> None:
    """Wait for processes that were told to end, kill what does not go."""
    _, left = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)


def is_running(process: psutil.Process) -> bool:
    """Whether a process still works (a zombie does not)."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def is_alive(pid: int) -> bool:
    """Whether a process with that number works; whose it is, is another question."""
    try:
        return is_running(psutil.Process(pid))
    except psutil.Error:
        return False


def is_ours(pid: int, root: Path, words: Sequence[str]) -> bool | None:
    """Whether a number is still that of a server or worker of this clone (numbers are reused).

    Args:
        pid: the number.
        root: the clone; a copied one has the notes of the original.
        words: what stands on its command line, which everybody may read.

    Returns:
        None: this account, or this container, may not see where the process works.
    """
    try:
        process = psutil.Process(pid)
        command = f" {' '.join(process.cmdline())} "
        return all(word in command for word in words) and works_in(process, root)
    except psutil.AccessDenied:
        return None
    except psutil.Error:
        return False


def note_left(path: Path, left: Sequence[Any]) -> None:
    """After a stop, keep the notes of what is left; without any the file goes.

    Where the disk cannot be written, what stands there names nobody who lives: who stops, looks.
    """
    with suppress(OSError):
        if left:
            write_json(path, [asdict(one) for one in left])
        else:
            path.unlink(missing_ok=True)


def hidden(name: str, pid: int) -> str:
    """What is said of a process for which `is_ours` is None."""
    return (
        f"{name} (process {pid}) may not be looked at from here: it is left alone, and so is its "
        "note; ask again as the account, and in the container, that started it"
    )


def orphans(root: Path, marks: Mapping[int, str]) -> Iterator[tuple[psutil.Process, int]]:
    """What leaders of sessions have left behind when they died, each with its leader's number.

    The mark says that it is theirs: numbers of processes are given anew, and a person who works in
    this clone may have started something in a session of the same number.

    Args:
        root: the clone; a copied one has the notes of the original.
        marks: `MARK` by the number of a leader that has ended.
    """
    for process in psutil.process_iter() if marks else ():
        with suppress(OSError, psutil.Error):
            leader = os.getsid(process.pid)
            if (
                leader in marks
                and process.environ().get(MARK) == marks[leader]
                and Path(process.cwd()).is_relative_to(root.resolve())
            ):
                yield process, leader


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
