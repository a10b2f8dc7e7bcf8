"""Which process a run belongs to, so that what was killed is not taken for running for ever.

A killed process says nothing. Every record, and every flow run of a terminal, names its owner; the
next command in the clone closes what is open without one (`close_ownerless`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.records.records import RunResult, all_records, read_json, records_dir, write_json

OWNER_FILE = "owner.json"
KILLED_MESSAGE = "its process ended without a result"


@dataclass(frozen=True)
class Owner:
    """A process on a machine; ids of processes are used again, so its start belongs to it."""

    host: str
    pid: int
    started: float

    @classmethod
    def of_this_process(cls) -> Owner:
        """The caller."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @classmethod
    def read(cls, values: Any) -> Owner | None:
        """From its JSON; None where that is something else."""
        try:
            return cls(str(values["host"]), int(values["pid"]), float(values["started"]))
        except (TypeError, KeyError, ValueError):
            return None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def is_gone(self) -> bool:
        """Whether the process has ended; False for another machine's, which cannot be seen here."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            # Both are read from the kernel's clock ticks, and rounded alike.
            same = abs(process.create_time() - self.started) < 1.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


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
