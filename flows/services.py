"""The two servers: Prefect (orchestration) and MLflow (records), on this machine only.

Embedded use (`ultraflux run --engine prefect`, `make run`) starts a Prefect server that ends with
the run. `ultraflux up` starts both as daemons and remembers them in `runs/services/services.json`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from flows.launcher import GuardedProcess
from flows.records import read_json, write_json
from flows.tracking import tracking_config

HOST = "127.0.0.1"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
LOG_DRAIN_S = 10.0


class ServiceError(RuntimeError):
    """A server cannot be started or reached; one line that says what to do."""


@dataclass(frozen=True)
class Service:
    """A running server."""

    name: str
    url: str
    pid: int
    log: str


def services_dir(root: Path) -> Path:
    """`runs/services`: databases, artifacts, logs."""
    return root / "runs" / "services"


def port_is_free(port: int) -> bool:
    """Whether 127.0.0.1:port can be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def prefect_environment(root: Path, port: int) -> dict[str, str]:
    """Variables that make Prefect use a server on `port` with its database inside the project."""
    home = services_dir(root) / "prefect"
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        # Everything goes to the UI; the terminal belongs to the pipeline's own lines, and Ctrl-C
        # would print a "crash" for every stage that had not started.
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # The memory default would leak concurrency slots when the server dies.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
    }


def prefect_command(port: int) -> list[str]:
    """Command line of the Prefect server."""
    return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]


def mlflow_command(root: Path, port: int) -> list[str]:
    """Command line of the MLflow server over the embedded store."""
    config = tracking_config(root)
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)),
        *("--backend-store-uri", config["backend_store"], "--workers", "1"),
        *("--artifacts-destination", str(config["artifact_root"])),
    ]


def wait_until_healthy(name: str, url: str, alive: psutil.Process | None, log: Path) -> None:
    """Poll `url` until it answers 200.

    Raises:
        ServiceError: the process ended or did not answer within 90 s.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        if alive is not None and not _is_running(alive):
            raise ServiceError(f"{name} ended while starting; see {log}")
        time.sleep(0.2)
    raise ServiceError(f"{name} did not answer at {url} within {START_TIMEOUT_S:.0f} s; see {log}")


def _is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _health_url(name: str, url: str) -> str:
    return f"{url}/api/health" if name == "prefect" else f"{url}/health"


@contextmanager
def embedded_prefect(root: Path) -> Iterator[dict[str, str]]:
    """A Prefect server for the time of one run (or the one from `ultraflux up`).

    Yields:
        Environment variables for Prefect clients; already set in this process as well.
    """
    running = {service.name: service for service in running_services(root)}
    if "prefect" in running:
        port = int(running["prefect"].url.rsplit(":", 1)[1])
        environment = prefect_environment(root, port)
        os.environ.update(environment)
        yield environment
        return
    port = free_port()
    environment = prefect_environment(root, port)
    Path(environment["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    os.environ.update(environment)
    log = root / "runs" / "logs" / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        server = GuardedProcess(
            prefect_command(port), cwd=root, env=dict(os.environ), output=output
        )
    try:
        url = f"http://{HOST}:{port}"
        wait_until_healthy("prefect", _health_url("prefect", url), psutil.Process(server.pid), log)
        yield environment
    finally:
        _send_prefect_logs()
        server.stop()


def _send_prefect_logs() -> None:
    """Send what Prefect's client still holds; with the server gone it would retry for a minute."""
    if "prefect.logging.handlers" in sys.modules:
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=LOG_DRAIN_S)


def up(root: Path, *, prefect_port: int, mlflow_port: int) -> list[Service]:
    """Start both servers as daemons, or return those that run already.

    Raises:
        ServiceError: a port is taken, or a server does not come up (the other is stopped again).
    """
    running = {service.name: service for service in running_services(root)}
    for name, port in {"prefect": prefect_port, "mlflow": mlflow_port}.items():
        if name not in running and not port_is_free(port):
            raise ServiceError(
                f"port {port} on {HOST} is taken, so {name} cannot start: choose another with "
                f"--{name}-port, or stop what listens there"
            )
    services_dir(root).mkdir(parents=True, exist_ok=True)
    started: list[Service] = []
    environment = prefect_environment(root, prefect_port)
    Path(environment["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    plans = {
        "prefect": (prefect_port, prefect_command(prefect_port), environment),
        "mlflow": (mlflow_port, mlflow_command(root, mlflow_port), {}),
    }
    try:
        for name, (port, command, extra) in plans.items():
            if name not in running:
                started.append(_daemon(root, name, port, command, extra))
        everything = [*running.values(), *started]
        write_json(_state(root), [asdict(service) for service in everything])
        for service in everything:
            url = _health_url(service.name, service.url)
            wait_until_healthy(service.name, url, psutil.Process(service.pid), Path(service.log))
    except ServiceError:
        for service in started:
            _stop(service)
        write_json(_state(root), [asdict(service) for service in running.values()])
        raise
    return sorted(everything, key=lambda service: service.name)


def down(root: Path) -> list[Service]:
    """Stop what `up` started; returns what was stopped."""
    services = running_services(root)
    for service in services:
        _stop(service)
    _state(root).unlink(missing_ok=True)
    return services


def running_services(root: Path) -> list[Service]:
    """Servers from `up` whose process is still there."""
    known = [Service(**values) for values in read_json(_state(root)) or []]
    return [service for service in known if _owns(service)]


def _state(root: Path) -> Path:
    return services_dir(root) / "services.json"


def _owns(service: Service) -> bool:
    """Whether the pid is still our server (pids are reused)."""
    try:
        command = " ".join(psutil.Process(service.pid).cmdline())
    except psutil.Error:
        return False
    return f"-m {service.name}" in command and service.url.rsplit(":", 1)[1] in command


def _daemon(
    root: Path, name: str, port: int, command: list[str], extra: Mapping[str, str]
) -> Service:
    log = root / "runs" / "logs" / f"{name}-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | dict(extra),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # A scheduler that ignores SIGINT would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )
    return Service(name, f"http://{HOST}:{port}", process.pid, str(log))


def _stop(service: Service) -> None:
    """Terminate a server and its children, kill what does not go."""
    try:
        parent = psutil.Process(service.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
