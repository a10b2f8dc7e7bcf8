"""How the servers of a project are: running, answering, and what waits to be sent to MLflow."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from flows.records.owners import close_ownerless
from flows.records.records import unsent_records
from flows.services import postgres
from flows.services import servers as services
from flows.services.clone_processes import hidden
from flows.services.servers import Service
from flows.services.workers import (
    forgotten_workers,
    hidden_workers,
    known_workers,
    running_workers,
)
from flows.tracking.tier import own_secrets, served_tier

PATIENCE_S = 5.0
State = Literal["healthy", "no answer", "died", "unknown"]
"""Unknown: this account may not look."""


@dataclass(frozen=True)
class ServiceStatus:
    """One server."""

    name: str
    state: State
    url: str
    pid: int | None
    up_s: float | None
    """Seconds since its start."""
    memory_bytes: int | None
    """Resident memory of the server and its children."""
    log: str


@dataclass(frozen=True)
class WorkerStatus:
    """One worker of this clone."""

    pool: str
    state: Literal["runs", "died", "unknown"]
    pid: int
    log: str
    server: str = ""
    """Address of the API that it works for, where that is noted."""


@dataclass(frozen=True)
class Status:
    """All servers and workers that were started in this clone."""

    tier: Literal["embedded", "served"]
    servers: list[ServiceStatus]
    workers: list[WorkerStatus]
    unsent: int
    """Ended runs that MLflow has not received completely."""

    @property
    def well(self) -> bool:
        """Whether every server that was started answers, and every worker runs."""
        servers_well = all(server.state == "healthy" for server in self.servers)
        return servers_well and all(worker.state == "runs" for worker in self.workers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def print(self) -> None:
        """A table."""
        from rich.console import Console
        from rich.table import Table

        table = Table("server", "state", "address", "pid", "up", "MiB")
        for one in self.servers:
            table.add_row(
                *(one.name, one.state, one.url, str(one.pid or "")),
                "" if one.up_s is None else f"{one.up_s / 3600:.1f} h",
                "" if one.memory_bytes is None else f"{one.memory_bytes / 2**20:.0f}",
            )
        console = Console(soft_wrap=True)
        wide = console.options.update_width(1000)
        if self.servers and console.measure(table, options=wide).maximum <= console.width:
            console.print(table)
            console.print("\n".join(f"{one.name} log: {one.log}" for one in self.servers))
        elif self.servers:
            # A terminal that would cut every cell off.
            for one in self.servers:
                console.print(f"{one.name}: {one.state} ({one.url}, log: {one.log})")
        else:
            console.print(f"No server was started (tier: {self.tier}; start: ultraflux up)")
        own = {"", *(f"{one.url}/api" for one in self.servers)}
        for worker in self.workers:
            place = "" if worker.server in own else f" for {worker.server}"
            console.print(
                f"worker {worker.pool}: {worker.state}{place} (pid {worker.pid}, log: {worker.log})"
            )
        for server in self.servers:
            if server.state == "unknown":
                console.print(hidden(server.name, server.pid or 0))
        for worker in self.workers:
            if worker.state == "unknown":
                console.print(hidden(f"worker {worker.pool}", worker.pid))
        dead_workers = any(worker.state == "died" for worker in self.workers)
        if dead_workers or any(one.state in {"died", "no answer"} for one in self.servers):
            again = "ultraflux up --workers" if dead_workers else "ultraflux up"
            console.print(f"Start what died with: {again}")
        if self.unsent:
            console.print(f"{self.unsent} ended runs wait for MLflow: ultraflux sync")


def examine(root: Path) -> Status:
    """Ask every server that was started whether it is well, and look for the workers."""
    close_ownerless(root)
    forgotten = services.forgotten_services(root)
    known = [*services.known_services(root), *forgotten]
    owned = {*services.running_services(root), *forgotten}
    unseen = services.hidden_services(root)
    with ThreadPoolExecutor() as pool:
        servers = list(
            pool.map(
                lambda one: _unknown(one) if one in unseen else _examine(root, one, one in owned),
                known,
            )
        )
    tier: Literal["embedded", "served"] = "embedded" if served_tier(root) is None else "served"
    lost = forgotten_workers(root)
    states: dict[Any, Literal["runs", "died", "unknown"]] = {
        **dict.fromkeys([*running_workers(root), *lost], "runs"),
        **dict.fromkeys(hidden_workers(root), "unknown"),
    }
    workers = [
        WorkerStatus(one.pool, states.get(one, "died"), one.pid, one.log, one.server)
        for one in [*known_workers(root), *lost]
    ]
    return Status(tier, servers, workers, len(unsent_records(root)))


def _unknown(service: Service) -> ServiceStatus:
    return ServiceStatus(
        *(service.name, "unknown", service.url, service.pid), None, None, service.log
    )


def _examine(root: Path, service: Service, runs: bool) -> ServiceStatus:
    if not runs:
        return ServiceStatus(service.name, "died", service.url, None, None, None, service.log)
    try:
        process = psutil.Process(service.pid)
        family = [process, *process.children(recursive=True)]
        started = time.time() - process.create_time()
    except psutil.Error:
        # It ended between two questions.
        return _examine(root, service, runs=False)
    state: State = "healthy" if _answers(root, service) else "no answer"
    return ServiceStatus(
        service.name, state, service.url, service.pid, started, _memory(family), service.log
    )


def _answers(root: Path, service: Service) -> bool:
    url = services.health_url(service)
    if url is None:
        return postgres.answers(service, own_secrets(root))
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return bool(answer.status == 200)
    except services.NO_ANSWER:
        return False


def _memory(family: Iterable[psutil.Process]) -> int:
    """Resident bytes; shared pages count in every process that maps them."""
    total = 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total
