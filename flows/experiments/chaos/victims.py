"""Which processes a drill may kill, and of what kind each of them is.

A process belongs to a drill when its environment carries the drill's mark, when it is a server that
the drill's clone has written down as its own, or when it descends from one of these. Nothing else
is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.experiments.chaos.site import MARK
from flows.services.servers import running_services

SERVERS = ("Prefect server", "MLflow", "PostgreSQL")


@dataclass(frozen=True)
class Victim:
    """A living process of the drill."""

    kind: str
    name: str
    """With what it works on: `stage vae`."""
    process: psutil.Process


def command_words(process: psutil.Process) -> list[str]:
    """A process's command line, also of one that was forked and has written its own over another's.

    Raises:
        psutil.Error: it has ended.
    """
    words = [word for word in process.cmdline() if word]
    return words[0].split() if len(words) == 1 else words


def kind_of(words: list[str]) -> tuple[str, str] | None:
    """Kind and name of a process by its command line; None: of no kind that a drill kills."""
    joined = f" {' '.join(words)} "
    if "guarded_process.py" in joined:
        return "launcher", "launcher"
    if len(words) > 2 and words[-3:-1] == ["stage", "run"]:
        return "stage", f"stage {words[-1]}"
    if "--wait-for-lock" in words:
        return "dvc", f"dvc {words[-1]}"
    for mark, kind in _MARKS.items():
        if mark in joined:
            return kind, kind
    if words and words[0].endswith("postgres") and "-D" in words:
        return "PostgreSQL", "PostgreSQL"
    return None


_MARKS = {
    " flows.tracking.uploader ": "uploader",
    " flows.running.warm_start ": "warm start",
    " prefect server start ": "Prefect server",
    " worker start --pool ": "worker",
    " prefect.engine ": "flow run",
    " mlflow server ": "MLflow",
    " torch.distributed.run ": "torchrun",
    " stage remote ": "remote stage",
    "/ultraflux run ": "pipeline",
    # Ranks run a module of the library; the corpus stages' workers are spawned.
    ".worker ": "rank",
    "multiprocessing.spawn": "item worker",
}


def marked(token: str, clones: Iterable[Path]) -> Iterator[psutil.Process]:
    """Every living process of the drill.

    Args:
        token: the drill's.
        clones: those whose servers are the drill's.
    """
    wanted = f"{MARK}={token}".encode()
    family: dict[int, psutil.Process] = {}
    own = os.getpid()
    for process in psutil.process_iter():
        with suppress(OSError):
            if wanted in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                family[process.pid] = process
    for clone in clones:
        for service in running_services(clone):
            with suppress(psutil.Error):
                family[service.pid] = psutil.Process(service.pid)
    # By their parents, for programs that write over their environment (PostgreSQL).
    for process in psutil.process_iter(["ppid"]):
        if process.info["ppid"] in family:
            family.setdefault(process.pid, process)
    family.pop(own, None)
    for process in family.values():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process


def victims(token: str, clones: Iterable[Path]) -> list[Victim]:
    """Processes of the drill that are of a kind, in the order of their ids."""
    found = []
    for process in marked(token, clones):
        with suppress(psutil.Error):
            if (kind := kind_of(command_words(process))) is not None:
                found.append(Victim(*kind, process))
    return sorted(found, key=lambda one: one.process.pid)
