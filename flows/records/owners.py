"""Which process a run belongs to, so that what was killed is not taken for running for ever.

A killed process says nothing. Every record, and every flow run of a terminal, names its owner; the
next command in the clone closes what is open without one (`close_ownerless`).
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.records.records import (
    RunResult,
    TornJson,
    all_records,
    from_json,
    read_json,
    records_dir,
    write_json,
)

OWNER_FILE = "owner.json"
KILLED_MESSAGE = "its process ended without a result"


@dataclass(frozen=True)
class Owner:
    """A process on a machine; ids of processes are used again, so its start belongs to it.

    What only Linux knows is None elsewhere, and in notes of older code.
    """

    host: str
    pid: int
    started: float
    """Seconds since 1970, by the clock as it stood when this was written."""
    boot: str | None = None
    """Drawn by the kernel whenever it starts; containers of a machine have it in common."""
    ticks: int | None = None
    """Of the kernel, from its boot to the start of the process: no set clock changes them."""
    namespace: str | None = None
    """Where the id counts: a container has ids of its own."""
    machine: str | None = None
    """Stays over boots and new host names; two machines of one image may have it in common."""

    def __post_init__(self) -> None:
        """Refuse what is no number of a process.

        Raises:
            ValueError: so it is.
        """
        if not 0 < self.pid < 2**31:
            raise ValueError(f"no process {self.pid}")

    @classmethod
    def of_this_process(cls) -> Owner:
        """The caller."""
        pid = os.getpid()
        machine = _text("/etc/machine-id")
        return cls(
            host=socket.gethostname(),
            pid=pid,
            started=psutil.Process().create_time(),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            ticks=_ticks(pid),
            namespace=_namespace(),
            # A hash: the name itself is nothing to hand on with a clone.
            machine=machine and hashlib.sha256(machine.encode()).hexdigest()[:16],
        )

    @classmethod
    def read(cls, values: Any) -> Owner | None:
        """From its JSON; None where that is something else."""
        with suppress(TornJson):
            return from_json(cls, values, Path(OWNER_FILE))
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def is_gone(self) -> bool:
        """Whether the process has ended; False for one that cannot be seen from here."""
        here = Owner.of_this_process()
        is_same_boot = self.boot is not None and self.boot == here.boot
        if is_same_boot and self.namespace != here.namespace:
            # Another container of this machine, or its host.
            return False
        if not is_same_boot and not self._is_of_the_machine_of(here):
            return False
        if not is_same_boot and self.boot is not None and here.boot is not None:
            return True
        try:
            process = psutil.Process(self.pid)
            if is_same_boot and self.ticks is not None:
                is_same = _ticks(self.pid) == self.ticks
            else:
                # Both are read from the kernel's clock ticks, and rounded alike.
                is_same = abs(process.create_time() - self.started) < 1.0
            return not is_same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return not _is_hidden(self.pid)

    def _is_of_the_machine_of(self, here: Owner) -> bool:
        """Whether two boots were of one machine, as far as its names tell.

        Both have to: a folder on a network is shared by machines that are called alike, or were
        made from one image.
        """
        is_another = self.machine is not None and here.machine not in {None, self.machine}
        return self.host == here.host and not is_another


def _text(path: str) -> str | None:
    """What stands in a file of the system, where there is one."""
    with suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="replace").strip() or None
    return None


def _namespace() -> str | None:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; the name before it may hold spaces and brackets."""
    stat = _text(f"/proc/{pid}/stat")
    return None if stat is None else int(stat.rpartition(")")[2].split()[19])


def _is_hidden(pid: int) -> bool:
    """Whether a process of another account works although the system does not list it (hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return False


def close_ownerless(root: Path) -> list[str]:
    """Mark open records whose process has gone as killed.

    Returns:
        Names of the runs that were closed.
    """
    closed = []
    for record in all_records(root):
        if record.result is not None:
            continue
        owner = Owner.read(read_json(record.folder / OWNER_FILE))
        if owner is not None and owner.is_gone():
            record.finish(RunResult(status="KILLED", error=KILLED_MESSAGE))
            closed.append(record.run.name)
    return closed


def own_record(root: Path, record_id: str) -> None:
    """Make this process the owner of a record."""
    write_json(records_dir(root) / record_id / OWNER_FILE, Owner.of_this_process().as_dict())


def _flow_runs(root: Path) -> Path:
    return root / "runs" / "flow-runs"


def own_flow_run(root: Path, flow_run_id: str) -> None:
    """Note that this process executes a flow run which no worker watches."""
    write_json(_flow_runs(root) / f"{flow_run_id}.json", Owner.of_this_process().as_dict())


def forget_flow_run(root: Path, flow_run_id: str) -> None:
    """The server knows how that flow run ended."""
    (_flow_runs(root) / f"{flow_run_id}.json").unlink(missing_ok=True)


def note_flow_run_end(root: Path, flow_run_id: str, state: str, message: str) -> None:
    """Keep how a flow run ended until a server can be told.

    Args:
        root: the clone.
        flow_run_id: the flow run.
        state: type of its final state, as Prefect names it (COMPLETED, FAILED, ...).
        message: of that state.
    """
    path = _flow_runs(root) / f"{flow_run_id}.json"
    write_json(path, {**(read_json(path) or {}), "end": [state, message]})


def ownerless_flow_runs(root: Path) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Noted flow runs whose process has gone before the server heard how they ended.

    Yields:
        Id, and state and message of the end (`note_flow_run_end`); None: the process was killed.
    """
    for path in sorted(_flow_runs(root).glob("*.json")):
        values = read_json(path)
        owner = Owner.read(values)
        if owner is None or owner.is_gone():
            end = values.get("end") if isinstance(values, dict) else None
            yield path.stem, (str(end[0]), str(end[1])) if end else None
