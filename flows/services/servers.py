"""The two servers: Prefect (orchestration) and MLflow (records), on this machine only.

`ultraflux up` starts both as daemons and remembers them in `runs/services/services.json`, in the
order of their start; `ultraflux up --served` puts PostgreSQL under them (`flows.services.served`).
Without either, a run has a Prefect server of its own (`flows.services.embedded_prefect`).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from flows.environment import project_name
from flows.records.records import read_list, write_json
from flows.services.clone_processes import (
    MARK,
    daemons_in,
    hidden,
    is_alive,
    is_ours,
    is_running,
    note_left,
    orphans,
    start_detached,
    wait_or_kill,
)
from flows.tracking.tier import LOOPBACK as HOST
from flows.tracking.tier import (
    embedded_clients,
    is_loopback,
    login_to_prefect,
    mlflow_login,
    own_secrets,
    served_clients,
    served_tier,
    sqlite_address,
    use_embedded,
    write_clients,
)
from flows.tracking.tier import services_dir as services_dir
from flows.tracking.uploader import keep_own_artifacts_here, tracking_config

START_TIMEOUT_S = 180.0
DEFAULT_PORTS = {"prefect": 4200, "mlflow": 5000}
_PROGRAMS = {
    "postgres": "postgres -D",
    "prefect": "-m prefect server start",
    "mlflow": "-m mlflow server",
}
"""What stands on a server's command line."""


class ServiceError(RuntimeError):
    """A server cannot be started or reached; one line that says what to do."""


class ServiceEnded(ServiceError):
    """A server's process ended before it answered."""


@dataclass(frozen=True)
class Service:
    """A running server."""

    name: str
    url: str
    pid: int
    log: str
    mark: str = ""
    """Of it and of all that it starts (`clone_processes.MARK`); notes of older code have none."""

    def __post_init__(self) -> None:
        """Refuse notes that name no process or no port.

        Raises:
            ValueError: so it is.
        """
        if self.pid < 1 or not self.url.rpartition(":")[2].isdecimal():
            raise ValueError(f"no process {self.pid} or no port in {self.url}")

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])


NO_ANSWER = (OSError, HTTPException)
"""What Python raises where nothing answers, or something else than a server of ours does."""


def port_is_free(port: int, host: str = HOST) -> bool:
    """Whether host:port can be bound."""
    with socket.socket() as probe:
        # As servers do: connections of a server that has just ended do not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def check_port(name: str, port: int, host: str = HOST) -> None:
    """Make sure that a server can listen.

    Raises:
        ServiceError: the port is taken.
    """
    if not port_is_free(port, host):
        raise ServiceError(
            f"port {port} on {host} is taken, so {name} cannot start: choose another with "
            f"--{name}-port, or stop what listens there"
        )


def refuse_one_port(ports: Mapping[str, int]) -> None:
    """Before a start: each server listens on a port of its own.

    Raises:
        ServiceError: two have the same.
    """
    owners: dict[int, str] = {}
    for name, port in ports.items():
        if (other := owners.setdefault(port, name)) != name:
            raise ServiceError(f"--{name}-port {port}: {other} is to listen there; choose another")


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def prefect_environment(root: Path, port: int) -> dict[str, str]:
    """Variables that make Prefect use a server on `port` with its database inside the project.

    For its clients and for the server itself: it asks for the project's login, answers pages of its
    own address alone, and its pages load nothing from elsewhere. In the served tier they also say
    how long clients wait.
    """
    home = services_dir(root) / "prefect"
    tier = served_tier(root)
    login = login_to_prefect(own_secrets(root)) if tier is None or tier.prefect_login else None
    hosts = dict.fromkeys([HOST, "localhost", HOST if tier is None else tier.client_host])
    origins = ",".join(f"http://{host}:{port}" for host in hosts)
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": sqlite_address(
            home / "prefect.db", "sqlite+aiosqlite"
        ),
        # Everything goes to the UI; the terminal belongs to the pipeline's own lines, and Ctrl-C
        # would print a "crash" for every stage that had not started.
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # The memory default would leak concurrency slots when the server dies.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        # Behind a proxy the pages have its address: then the user's value counts.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": os.environ.get(
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS", origins
        ),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        **(
            {}
            if login is None
            else {"PREFECT_SERVER_API_AUTH_STRING": login, "PREFECT_API_AUTH_STRING": login}
        ),
        **{key: value for key, value in served_clients(root).items() if key.startswith("PREFECT_")},
    }


def prefect_command(port: int, host: str = HOST) -> list[str]:
    """Command line of the Prefect server."""
    return [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]


def mlflow_command(root: Path, port: int) -> list[str]:
    """Command line of the MLflow server over the embedded store; see `mlflow_environment`."""
    config = tracking_config(root)
    return mlflow_server(HOST, port, config["backend_store"], str(config["artifact_root"]), 1)


def mlflow_server(host: str, port: int, store: str, artifacts: str, workers: int) -> list[str]:
    """Command line of an MLflow server, which answers requests and pages of its own address alone.

    One that other machines reach keeps MLflow's default of private addresses: under which names
    they know it is not known here.
    """
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
        *("--host", host, "--port", str(port), "--workers", str(workers)),
        *("--backend-store-uri", store, "--artifacts-destination", artifacts),
    ]
    if not is_loopback(host):
        return command
    names = [f"{name}:{port}" for name in dict.fromkeys([HOST, "localhost", host])]
    origins = ",".join(f"http://{name}" for name in names)
    return [*command, "--allowed-hosts", ",".join(names), "--cors-allowed-origins", origins]


def mlflow_environment(root: Path) -> dict[str, str]:
    """Variables of the MLflow server over the embedded store: it asks for the project's login."""
    users = services_dir(root) / "mlflow-users.db"
    users.parent.mkdir(parents=True, exist_ok=True)
    return mlflow_login(root, sqlite_address(users))


def wait_until_healthy(name: str, url: str, alive: psutil.Process | None, log: Path) -> None:
    """Poll `url` until it answers 200.

    Raises:
        ServiceEnded: the process ended.
        ServiceError: it did not answer within 3 minutes.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except NO_ANSWER:
            pass
        if alive is not None and not is_running(alive):
            raise ServiceEnded(f"{name} ended while starting; see {log}")
        time.sleep(0.2)
    raise ServiceError(f"{name} did not answer at {url} within {START_TIMEOUT_S:.0f} s; see {log}")


def health_url(service: Service) -> str | None:
    """Where a server says that it is well; None: it does not speak HTTP."""
    return {"prefect": f"{service.url}/api/health", "mlflow": f"{service.url}/health"}.get(
        service.name
    )


def wait_for_all(services: Iterable[Service]) -> None:
    """Wait beside each other until every server answers.

    Raises:
        ServiceError: one ended or did not answer in time.
    """
    with ThreadPoolExecutor() as pool:
        waits = [
            pool.submit(
                wait_until_healthy,
                *(service.name, url, psutil.Process(service.pid), Path(service.log)),
            )
            for service in services
            if (url := health_url(service)) is not None
        ]
    for wait in waits:
        wait.result()


@contextmanager
def up_lock(root: Path) -> Iterator[None]:
    """One `up` or `down` of a project at a time; a second waits.

    Where the disk cannot be written, nothing can be started, and what runs can be stopped.
    """
    with ExitStack() as held:
        with suppress(OSError):
            services_dir(root).mkdir(parents=True, exist_ok=True)
            file = held.enter_context((services_dir(root) / ".up.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def up(
    root: Path, *, prefect_port: int | None = None, mlflow_port: int | None = None
) -> list[Service]:
    """Start both embedded servers as daemons, or return those that run already.

    Args:
        root: repository root; it belongs to the embedded tier from now on.
        prefect_port: None: the port it runs on, else 4200.
        mlflow_port: None: the port it runs on, else 5000.

    Raises:
        ServiceError: a port is taken, a server runs on another one, or a server does not come up
            (the other is stopped again).
        ProjectNameRefused: the clients' file would name no project.
    """
    project_name(root)
    with up_lock(root):
        end_orphans(root)
        refuse_unknown(root)
        running = {service.name: service for service in running_services(root)}
        given = {"prefect": prefect_port, "mlflow": mlflow_port}
        refuse_one_port({n: given[n] or DEFAULT_PORTS[n] for n in given if n not in running})
        for name, wanted in given.items():
            if name not in running:
                check_port(name, wanted or DEFAULT_PORTS[name])
            elif wanted is not None and not running[name].url.endswith(f":{wanted}"):
                raise ServiceError(
                    f"--{name}-port {wanted}: {name} runs at {running[name].url}; stop it first "
                    "with `ultraflux down`"
                )
        use_embedded(root)
        prefect_port = prefect_port or DEFAULT_PORTS["prefect"]
        mlflow_port = mlflow_port or DEFAULT_PORTS["mlflow"]
        environment = prefect_environment(root, prefect_port)
        Path(environment["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
        keep_own_artifacts_here(root, tracking_config(root)["backend_store"])
        plans = {
            "prefect": (prefect_port, prefect_command(prefect_port), environment),
            "mlflow": (mlflow_port, mlflow_command(root, mlflow_port), mlflow_environment(root)),
        }
        started: list[Service] = []
        try:
            for name, (port, command, extra) in plans.items():
                if name not in running:
                    url = f"http://{HOST}:{port}"
                    started.append(start_daemon(root, name, url, command, extra))
                    remember(root, started[-1])
            wait_for_all([*running.values(), *started])
            servers = sorted([*running.values(), *started], key=lambda service: service.name)
            addresses = {service.name: service.url for service in servers}
            write_clients(root, embedded_clients(root, addresses["prefect"], addresses["mlflow"]))
        except BaseException:
            stop(root, started)
            raise
        return servers


def down(root: Path) -> list[Service]:
    """Stop what `up` started, the last one first; returns what was stopped.

    What may not be looked at stays as it is, noted (`hidden_services`).
    """
    with up_lock(root):
        stopped = [*running_services(root)[::-1], *forgotten_services(root)[::-1]]
        for service in stopped:
            stop_service(service)
        end_orphans(root)
        note_left(services_note(root), hidden_services(root))
        return stopped


def end_orphans(root: Path) -> None:
    """Kill what servers that died have left behind, whose workers hold the port of the next one."""
    dead = {one.pid: one for one in known_services(root) if one.mark and not is_alive(one.pid)}
    left = []
    for process, leader in orphans(root, {pid: one.mark for pid, one in dead.items()}):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())[:80]
            process.kill()
            left.append(process)
            name = dead[leader].name
            print(f"{name} had died: its process {process.pid} was ended ({command})", flush=True)
    wait_or_kill(left)


def stop(root: Path, services: Iterable[Service]) -> None:
    """Stop servers in reverse order of their start and forget them."""
    gone = sorted(services, key=known_services(root).index, reverse=True)
    for service in gone:
        stop_service(service)
    write_json(services_note(root), [asdict(s) for s in known_services(root) if s not in gone])


def remember(root: Path, service: Service) -> None:
    """Add a server to those that `down` stops; it takes the place of one of the same name."""
    known = {one.name: one for one in known_services(root)} | {service.name: service}
    write_json(services_note(root), [asdict(one) for one in known.values()])


def services_note(root: Path) -> Path:
    """Where servers that were started stand until they are stopped."""
    return services_dir(root) / "services.json"


def known_services(root: Path) -> list[Service]:
    """Servers from `up` in the order of their start, whether they still run or not."""
    return read_list(Service, services_note(root))


def running_services(root: Path) -> list[Service]:
    """Servers from `up` whose process is still there."""
    return [service for service in known_services(root) if _owns(root, service)]


def hidden_services(root: Path) -> list[Service]:
    """Servers from `up` that may not be looked at: another account's, or a container's."""
    return [service for service in known_services(root) if _owns(root, service) is None]


def forgotten_services(root: Path) -> list[Service]:
    """Servers of this clone by their processes alone: somebody has removed runs/services."""
    known = {service.pid for service in known_services(root)}
    found = []
    for process, command in daemons_in(root):
        words = " ".join(command)
        name = next((name for name, program in _PROGRAMS.items() if program in words), None)
        port = _value(command, "--port", "-p")
        if name is not None and port is not None and process.pid not in known:
            scheme, host = (
                ("postgresql" if name == "postgres" else "http"),
                _value(command, "--host"),
            )
            url = f"{scheme}://{HOST if host in {None, '0.0.0.0', '::'} else host}:{port}"
            found.append(Service(name, url, process.pid, str(_log(root, name))))
    return found


def _value(command: list[str], *options: str) -> str | None:
    """What stands behind an option."""
    return next((value for name, value in pairwise(command) if name in options), None)


def refuse_unknown(root: Path) -> None:
    """Before a start: servers that may not be looked at, or whose notes have gone.

    With the notes their passwords and databases have.

    Raises:
        ServiceError: there are some.
    """
    for service in hidden_services(root):
        raise ServiceError(hidden(service.name, service.pid))
    if forgotten := forgotten_services(root):
        names = " and ".join(f"{service.name} at {service.url}" for service in forgotten)
        raise ServiceError(
            f"{names} of this clone run, of which runs/services does not know: stop them first "
            "with `ultraflux down`"
        )


def _log(root: Path, name: str) -> Path:
    return root / "runs" / "logs" / f"{name}-server.log"


def _owns(root: Path, service: Service) -> bool | None:
    """As `is_ours`; the port as well: another clone's server may have got the number."""
    program = _PROGRAMS.get(service.name)
    return program is not None and is_ours(service.pid, root, [program, str(service.port)])


def start_daemon(
    root: Path,
    name: str,
    url: str,
    command: list[str],
    extra: Mapping[str, str],
    **options: Any,
) -> Service:
    """Start a program that outlives this one; its output goes to runs/logs/NAME-server.log.

    Args:
        root: repository root, and working folder unless `options` name another.
        name: name of the service.
        url: where it will listen.
        command: program and arguments.
        extra: environment variables beside this process's own.
        options: further arguments of `subprocess.Popen`.
    """
    log, mark = _log(root, name), secrets.token_hex(16)
    env = os.environ | dict(extra) | {MARK: mark}
    pid = start_detached(command, log, env, **({"cwd": root} | options))
    return Service(name, url, pid, str(log), mark)


def stop_service(service: Service) -> None:
    """Terminate a server and its children, kill what does not go."""
    try:
        parent = psutil.Process(service.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    if service.name == "postgres":
        # Its "fast" shutdown: ends sessions itself and writes everything; SIGTERM would wait for
        # clients for ever.
        parent.send_signal(signal.SIGINT)
    else:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
    wait_or_kill(family)
