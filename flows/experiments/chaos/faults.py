"""What happens to a run, when, and how it is done: drawn from a seed."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.experiments.chaos.victims import Victim

REMOTE_AWAY, DISK_FULL = "remote away", "disk full"
WEIGHTS = {
    "pipeline": 3,
    "dvc": 3,
    "stage": 4,
    "rank": 3,
    "torchrun": 2,
    "launcher": 3,
    "warm start": 2,
    "item worker": 1,
    "uploader": 2,
    "Prefect server": 1,
    "worker": 1,
    "flow run": 1,
    "remote stage": 1,
    "MLflow": 1,
    "PostgreSQL": 1,
    REMOTE_AWAY: 1,
    DISK_FULL: 2,
}
"""How often each kind is asked for first; kinds that a run does not have are passed over."""
FULL = {"pipeline", "dvc", "stage", "rank", "uploader"}
"""Whose disk gets full: a limit on the size of files that they write, which needs no root."""
_LIMITS = (0, 4096, 65536)
_AWAY_S = (2.0, 15.0)


@dataclass(frozen=True)
class Draw:
    """One entry of the schedule."""

    wait_s: float
    """After the fault before, or the start of the run."""
    order: tuple[str, ...]
    """Kinds, the wanted one first."""
    choice: float
    """Which of several victims, 0 to 1."""
    amount: float
    """How much, 0 to 1: of a limit, of a time away."""


@dataclass
class Fault:
    """What was done, and what the run said then."""

    at_s: float
    kind: str
    pid: int | None
    what: str
    engine: str
    said: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def schedule(seed: int, every_s: float, kinds: Sequence[str]) -> Iterator[Draw]:
    """The same entries for the same seed, without end.

    Args:
        seed: of the drill.
        every_s: mean distance of two faults.
        kinds: those that may be drawn.

    Raises:
        ValueError: an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in WEIGHTS]:
        raise ValueError(f"{unknown[0]}: choose from {', '.join(WEIGHTS)}")
    draw = random.Random(seed)
    while True:
        # Weighted and without repetition: the largest of u^(1/weight) comes first.
        keys = {kind: draw.random() ** (1 / WEIGHTS[kind]) for kind in kinds}
        order = tuple(sorted(kinds, key=lambda kind: -keys[kind]))
        # At once, too: what happens in the first moments of a run is a case of its own.
        yield Draw(draw.uniform(0.0, 2 * every_s), order, draw.random(), draw.random())


def inflict(
    draw: Draw, alive: Sequence[Victim], remote: Path | None
) -> tuple[str, Victim | None, float] | None:
    """Do what an entry says to whatever is there.

    Args:
        draw: the entry.
        alive: processes of the drill.
        remote: folder that can be taken away; None: the run uses none.

    Returns:
        Kind, the process, and for how many seconds the remote stays away; None: nothing of the
        wanted kinds is there.
    """
    for kind in draw.order:
        if kind == REMOTE_AWAY:
            if remote is not None and remote.is_dir():
                take_away(remote)
                return kind, None, _AWAY_S[0] + draw.amount * (_AWAY_S[1] - _AWAY_S[0])
            continue
        wanted = FULL if kind == DISK_FULL else {kind}
        those = [victim for victim in alive if victim.kind in wanted]
        if not those:
            continue
        victim = those[int(draw.choice * len(those))]
        # It may have ended since; then the next kind.
        with suppress(psutil.Error, OSError):
            if kind == DISK_FULL:
                _fill_disk(victim.process, _LIMITS[int(draw.amount * len(_LIMITS))])
            else:
                victim.process.kill()
            return kind, victim, 0.0
    return None


def take_away(remote: Path) -> None:
    """Nothing can be read from the remote, or written to it, until `bring_back`."""
    remote.rename(_away(remote))
    # Where there is nothing, DVC makes a new folder and believes to have pushed.
    remote.touch()


def bring_back(remote: Path) -> None:
    """Undo `take_away`; nothing where it was not called."""
    elsewhere = _away(remote)
    if not elsewhere.is_dir():
        return
    if remote.is_dir():
        # Somebody was quicker than the file that was to stand in the way.
        shutil.copytree(remote, elsewhere, dirs_exist_ok=True)
        shutil.rmtree(remote)
    remote.unlink(missing_ok=True)
    elsewhere.rename(remote)


def _away(remote: Path) -> Path:
    return remote.with_name(f"{remote.name}.away")


def _fill_disk(process: psutil.Process, limit_bytes: int) -> None:
    """No file of this process, or of one that it starts from now on, grows beyond the limit."""
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            _, hard = resource.prlimit(one.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (limit_bytes, hard))
