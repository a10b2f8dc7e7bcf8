"""The served tier: Prefect and MLflow on a PostgreSQL of the project's own.

Order of start: PostgreSQL and its databases; then Prefect (which migrates its database itself)
beside MLflow (after `mlflow db upgrade`). `servers.down` stops in reverse order. What runs
already is left alone, so `up` again repairs what has died.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from components.files.install_hints import install_hint
from components.telemetry.last_words import last_words
from flows.environment import project_name
from flows.services import postgres
from flows.services import servers as services
from flows.services.servers import Service, ServiceError
from flows.tracking.tier import (
    LOOPBACK,
    ServedTier,
    mlflow_login,
    passfile,
    served_tier,
    use_served,
)

PACKAGES = {"psycopg": "psycopg[binary]", "asyncpg": "asyncpg"}
"""Import name and package of what the servers need beyond the embedded tier."""
MLFLOW_WORKERS = 2


def missing_packages() -> list[str]:
    """Packages of the extra `serve` that are not installed."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def up(root: Path, tier: ServedTier) -> list[Service]:
    """Start what does not run yet; the project belongs to the served tier from now on.

    Raises:
        ServiceError: something is not installed, a port is taken, or a server does not come up
            (then those that this call started are stopped again).
        ProjectNameRefused: the clients' file would name no project.
    """
    if missing := missing_packages():
        raise ServiceError(
            f"the served tier needs {', '.join(missing)}: make services SERVED=1 installs them "
            f"as locked, or {install_hint('serve')}"
        )
    # Looked for before anything is started, or written down.
    project_name(root)
    postgres.find_programs()
    with services.up_lock(root):
        services.end_orphans(root)
        services.refuse_unknown(root)
        running = {service.name: service for service in services.running_services(root)}
        _check(root, running, tier)
        known = use_served(root, tier)
        started: list[Service] = []
        try:
            if "postgres" not in running:
                running["postgres"] = postgres.start(root, tier.postgres_port, known)
                _note(root, started, running["postgres"])
            postgres.create_databases(running["postgres"], known)
            _start_beside_each_other(root, tier, running, started)
            services.wait_for_all([*running.values(), *started])
        except BaseException:
            services.stop(root, started)
            raise
        return services.running_services(root)


def _note(root: Path, started: list[Service], service: Service) -> None:
    """Remember a server at once: whatever happens next, `down` knows of it."""
    started.append(service)
    services.remember(root, service)


def _start_beside_each_other(
    root: Path,
    tier: ServedTier,
    running: dict[str, Service],
    started: list[Service],
) -> None:
    starters = {"prefect": _start_prefect, "mlflow": _start_mlflow}
    problem: BaseException | None = None
    with ThreadPoolExecutor() as pool:
        waiting = [
            pool.submit(begin, root, tier)
            for name, begin in starters.items()
            if name not in running
        ]
        # All of them, also after a failure: what the other one started must be noted, or nobody
        # stops it.
        for future in as_completed(waiting):
            if (failure := future.exception()) is None:
                _note(root, started, future.result())
            else:
                problem = failure
    if problem is not None:
        raise problem


def _check(root: Path, running: dict[str, Service], tier: ServedTier) -> None:
    """Refuse what cannot work before anything starts.

    Raises:
        ServiceError: embedded servers run, servers run with other options, two are given one port,
            or a port is taken.
    """
    before = served_tier(root)
    if running and before != tier:
        kind = "with other options" if before else "in the embedded tier"
        raise ServiceError(f"servers are running {kind}: stop them first with `ultraflux down`")
    ports = {
        "postgres": tier.postgres_port,
        "prefect": tier.prefect_port,
        "mlflow": tier.mlflow_port,
    }
    services.refuse_one_port(ports)
    for name, port in ports.items():
        if name not in running:
            services.check_port(name, port, LOOPBACK if name == "postgres" else tier.host)


def _start_prefect(root: Path, tier: ServedTier) -> Service:
    environment = services.prefect_environment(root, tier.prefect_port) | {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": tier.database_uri("prefect", "asyncpg"),
        "PGPASSFILE": str(passfile(root)),
    }
    Path(environment["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    command = services.prefect_command(tier.prefect_port, tier.host)
    url = f"http://{tier.client_host}:{tier.prefect_port}"
    return services.start_daemon(root, "prefect", url, command, environment)


def _start_mlflow(root: Path, tier: ServedTier) -> Service:
    database = tier.database_uri("mlflow", "psycopg")
    environment = mlflow_login(root, tier.database_uri("mlflow_auth", "psycopg")) | {
        "PGPASSFILE": str(passfile(root))
    }
    migrated = subprocess.run(
        [sys.executable, "-m", "mlflow", "db", "upgrade", database],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if migrated.returncode != 0:
        said = last_words(migrated.stderr)
        raise ServiceError(f"MLflow's database cannot be brought up to date: {said}")
    command = services.mlflow_server(
        tier.host, tier.mlflow_port, database, tier.artifacts, MLFLOW_WORKERS
    )
    url = f"http://{tier.client_host}:{tier.mlflow_port}"
    return services.start_daemon(root, "mlflow", url, command, environment)
