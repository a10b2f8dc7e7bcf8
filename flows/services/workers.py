"""Workers of this machine: one process per pool, started last, stopped first."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from flows.environment import PROJECT, pool_name, project_name
from flows.records.records import read_list, write_json
from flows.services.clone_processes import (
    daemons_in,
    hidden,
    is_alive,
    is_ours,
    note_left,
    start_detached,
    wait_or_kill,
)
from flows.services.prefect_connection import API_URL, one_spelling
from flows.services.servers import ServiceError, services_dir

POOLS = ("pipelines", "cpu", "gpu")
START_TIMEOUT_S = 120.0
QUERY_S = "2"
"""How often a worker asks for work; Prefect's default of 10 s would be most of a stage's delay."""


@dataclass(frozen=True)
class Worker:
    """A running worker."""

    pool: str
    name: str
    pid: int
    log: str
    server: str = ""
    """Address of the API that it works for; notes of older code have none."""
    project: str = ""
    """Whose pool of that server."""
    limit: int | None = None
    """Flow runs that it takes at once."""

    def __post_init__(self) -> None:
        """Refuse notes that name no process.

        Raises:
            ValueError: so it is.
        """
        if self.pid < 1:
            raise ValueError(f"no process {self.pid}")


def worker_environment(root: Path) -> dict[str, str]:
    """Variables of a worker whose flows run in the clone at `root`."""
    programs = Path(sys.executable).parent
    return {
        "ULTRAFLUX_ROOT": str(root),
        PROJECT: project_name(root),
        "PREFECT_WORKER_QUERY_SECONDS": QUERY_S,
        "PREFECT_WORKER_PREFETCH_SECONDS": QUERY_S,
        # Job commands are `python -m prefect.engine`: this environment's.
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(root),
    }


def worker_command(pool: str, name: str, limit: int | None = None) -> list[str]:
    """Command line of a worker.

    Args:
        pool: its work pool's name on the server.
        name: its name on the server.
        limit: flow runs that it takes at once; None: as many as the pool gives.
    """
    return [
        *(sys.executable, "-m", "prefect", "--no-prompt", "worker", "start", "--pool", pool),
        *("--name", name, "--type", "process", "--install-policy", "never"),
        "--no-create-pool-if-not-found",
        *([] if limit is None else ["--limit", str(limit)]),
    ]


def start_workers(
    root: Path, pools: tuple[str, ...] = POOLS, limit: int | None = None
) -> list[Worker]:
    """Start a worker for each pool that has none from here, and wait until they are online.

    Args:
        root: the clone that their flows run in.
        pools: work pools.
        limit: flow runs that each takes at once; None: as many as its pool gives.

    Raises:
        ServiceError: a worker ends at once or does not come online; those started are stopped. Or
            one of those before may not be looked at, works elsewhere or takes another number.
    """
    for worker in hidden_workers(root):
        raise ServiceError(hidden(f"worker {worker.pool}", worker.pid))
    known = running_workers(root)
    for worker in known:
        _refuse_other_work(worker, root, limit)
    started: list[Worker] = []
    for pool in pools:
        if pool not in {worker.pool for worker in known}:
            started.append(_start(root, pool, limit))
    # Before the wait: an interrupted start leaves workers that `down` knows of.
    write_json(workers_note(root), [asdict(worker) for worker in [*known, *started]])
    try:
        # Those from before, too: of what older code has noted nobody knows where it works.
        _wait_until_online(root, [*known, *started])
    except ServiceError:
        _stop(started)
        write_json(workers_note(root), [asdict(worker) for worker in known])
        raise
    return [*known, *started]


def stop_workers(root: Path) -> list[Worker]:
    """Stop the workers of this clone and the runs they have begun; returns them.

    What may not be looked at stays as it is, noted (`hidden_workers`).
    """
    workers = [*running_workers(root), *forgotten_workers(root)]
    _stop(workers)
    note_left(workers_note(root), hidden_workers(root))
    return workers


def running_workers(root: Path) -> list[Worker]:
    """Workers from `start_workers` whose process is still there."""
    return [worker for worker in known_workers(root) if _is_ours(root, worker)]


def hidden_workers(root: Path) -> list[Worker]:
    """Workers from `start_workers` that may not be looked at: another account's, a container's."""
    return [worker for worker in known_workers(root) if _is_ours(root, worker) is None]


def workers_note(root: Path) -> Path:
    """Where workers that were started stand until they are stopped."""
    return services_dir(root) / "workers.json"


def known_workers(root: Path) -> list[Worker]:
    """Workers that were started and not stopped, whether they still run or not."""
    return read_list(Worker, workers_note(root))


def forgotten_workers(root: Path) -> list[Worker]:
    """Workers of this clone by their processes alone: somebody has removed runs/services."""
    known = {worker.pid for worker in known_workers(root)}
    found = []
    for process, command in daemons_in(root):
        # As `worker_command` has it: people start others, of other types, in the clone's folder.
        if process.pid not in known and "--type process --install-policy never" in " ".join(
            command
        ):
            pool, name = (command[command.index(word) + 1] for word in ("--pool", "--name"))
            kind = pool.rpartition("-")[2]
            found.append(Worker(kind, name, process.pid, str(_log(root, kind))))
    return found


def _log(root: Path, pool: str) -> Path:
    return root / "runs" / "logs" / f"worker-{pool}.log"


def _is_ours(root: Path, worker: Worker) -> bool | None:
    return is_ours(worker.pid, root, [f" {worker.name} "])


def _refuse_other_work(worker: Worker, root: Path, limit: int | None) -> None:
    if not worker.server:
        return
    place = (one_spelling(os.environ[API_URL]), project_name(root))
    if (worker.server, worker.project) != place:
        what = f"works for {worker.server}, project {worker.project}"
    elif limit not in {None, worker.limit}:
        what = f"takes {worker.limit or 'any number of'} runs at once"
    else:
        return
    raise ServiceError(
        f"worker {worker.pool} of this clone {what}: stop it first with `ultraflux down`"
    )


def _start(root: Path, pool: str, limit: int | None) -> Worker:
    name = f"{socket.gethostname()}-{pool}-{os.getpid()}"
    log = _log(root, pool)
    project = project_name(root)
    command = worker_command(pool_name(project, pool), name, limit)
    pid = start_detached(command, log, os.environ | worker_environment(root), cwd=root)
    server = one_spelling(os.environ[API_URL])
    return Worker(pool, name, pid, str(log), server, project, limit)


def _wait_until_online(root: Path, workers: list[Worker]) -> None:
    from prefect import get_client
    from prefect.client.schemas.objects import WorkerStatus

    deadline = time.monotonic() + START_TIMEOUT_S
    waiting = list(workers)
    with get_client(sync_client=True) as client:
        while waiting:
            for worker in list(waiting):
                if not _is_ours(root, worker) or not is_alive(worker.pid):
                    raise ServiceError(
                        f"worker {worker.pool} ended while starting; see {worker.log}"
                    )
                online = client.read_workers_for_work_pool(
                    pool_name(project_name(root), worker.pool)
                )
                if any(w.name == worker.name and w.status == WorkerStatus.ONLINE for w in online):
                    waiting.remove(worker)
            if waiting and time.monotonic() > deadline:
                raise ServiceError(
                    f"worker {waiting[0].pool} did not come online within {START_TIMEOUT_S:.0f} s; "
                    f"see {waiting[0].log}"
                )
            if waiting:
                time.sleep(0.3)


def _stop(workers: list[Worker]) -> None:
    """SIGTERM to the workers, which stop their runs; then whatever of their families is left."""
    family: list[psutil.Process] = []
    for worker in workers:
        try:
            parent = psutil.Process(worker.pid)
            # Now, while the parent lives: afterwards its children belong to init and cannot be
            # found.
            family += [*parent.children(recursive=True), parent]
            parent.terminate()
        except psutil.NoSuchProcess:
            continue
    wait_or_kill(family)
