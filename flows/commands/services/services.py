"""`ultraflux up | down | status | sync`: the servers of this project."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import fail, print_json, project_root, refusing

if TYPE_CHECKING:
    from pathlib import Path

    from flows.tracking.tier import ServedTier

_LAST_PORT = 65535


def up(
    served: Annotated[
        bool | None,
        typer.Option(
            "--served/--embedded",
            help="On PostgreSQL with logins, or on SQLite (default: as before, at first embedded).",
        ),
    ] = None,
    prefect_port: Annotated[
        int | None, typer.Option(min=1, max=_LAST_PORT, help="Port of Prefect (4200).")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(min=1, max=_LAST_PORT, help="Port of MLflow (5000).")
    ] = None,
    postgres_port: Annotated[
        int | None,
        typer.Option(min=1, max=_LAST_PORT, help="Port of PostgreSQL (at first any that is free)."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (127.0.0.1); needs --served.")
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(help="MLflow's artifacts: a folder, or s3://bucket/prefix; needs --served."),
    ] = None,
    prefect_login: Annotated[
        bool | None,
        typer.Option(help="Prefect asks for a password too (always where others can reach it)."),
    ] = None,
    workers: Annotated[
        bool, typer.Option("--workers", help="Then deploy, and start a worker per pool.")
    ] = False,
) -> None:
    """Start what does not run of the Prefect and MLflow servers; print their addresses."""
    from flows.services import served as served_servers
    from flows.services import servers as services
    from flows.tracking.tier import (
        ADMIN,
        is_loopback,
        login_to_prefect,
        own_secrets,
        passfile,
        served_tier,
        services_dir,
    )

    root = project_root()
    before = served_tier(root)
    wanted = before is not None if served is None else served
    only_served = {
        "--postgres-port": postgres_port,
        "--host": host,
        "--artifacts": artifacts,
        "--prefect-login": prefect_login,
    }
    given = [name for name, value in only_served.items() if value is not None]
    with refusing(services.ServiceError, code=1):
        if not wanted:
            if given:
                raise fail(f"{given[0]} is an option of the served tier: add --served")
            if before is not None and services.running_services(root):
                raise fail("the served tier is running: stop it first with `ultraflux down`", 1)
            started = services.up(root, prefect_port=prefect_port, mlflow_port=mlflow_port)
        else:
            tier = _tier(
                root,
                before,
                {
                    "prefect_port": prefect_port,
                    "mlflow_port": mlflow_port,
                    "postgres_port": postgres_port,
                    "host": host,
                    "artifacts": artifacts,
                    "prefect_login": prefect_login,
                },
            )
            started = served_servers.up(root, tier)
    for service in started:
        print(f"{service.name:<8} {service.url}   (log: {service.log})")
    clients = services_dir(root) / "clients.env"
    if not wanted or tier.prefect_login:
        known = own_secrets(root)
        print(f"Log in to Prefect with {login_to_prefect(known)}")
        print(f"Log in to MLflow as {ADMIN} with {known.mlflow_admin}")
    print(f"For other shells, programs and clones: set -a; . {clients}")
    if wanted:
        print(
            f"Databases: PGPASSFILE={passfile(root)} psql -h 127.0.0.1 "
            f"-p {tier.postgres_port} -U mlflow mlflow"
        )
        if not is_loopback(tier.host):
            print(
                f"warning: {tier.host} can be reached from other machines, without encryption: "
                "put a TLS proxy in front of it",
                file=sys.stderr,
            )
    if workers:
        from flows.commands.services.deploy import deploy

        deploy(workers=True, pools="process")
    print("Stop them with: ultraflux down")


def _tier(root: Path, before: ServedTier | None, given: dict[str, object]) -> ServedTier:
    """What the served tier is to look like: as before but for what was given."""
    from dataclasses import replace

    from flows.services.servers import free_port
    from flows.tracking.tier import ServedTier, is_loopback, services_dir

    tier = before or ServedTier(postgres_port=free_port())
    tier = replace(tier, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    artifacts = tier.artifacts or str(services_dir(root) / "artifacts-served")
    if "://" not in artifacts:
        artifacts = str((root / artifacts).resolve())
    return replace(
        tier, artifacts=artifacts, prefect_login=tier.prefect_login or not is_loopback(tier.host)
    )


def down() -> None:
    """Stop the servers that `ultraflux up` started, their workers first."""
    from flows.services.clone_processes import hidden
    from flows.services.servers import down as stop
    from flows.services.servers import hidden_services, services_note
    from flows.services.workers import hidden_workers, stop_workers, workers_note

    root = project_root()
    for worker in stop_workers(root):
        print(f"stopped worker {worker.pool}")
    stopped = stop(root)
    left = [hidden(f"worker {one.pool}", one.pid) for one in hidden_workers(root)]
    left += [hidden(one.name, one.pid) for one in hidden_services(root)]
    if not left:
        notes = [path for path in (workers_note(root), services_note(root)) if path.exists()]
        left = [f"{path} could not be removed; nothing in it runs any more" for path in notes]
    if stopped or not left:
        print("\n".join(f"stopped {s.name} ({s.url})" for s in stopped) or "nothing was running")
    _say_what_is_left(root)
    if left:
        raise fail("\n".join(left), 1)


def _say_what_is_left(root: Path) -> None:
    """A line about what runs have left behind, where there is anything worth it."""
    from flows.running.leftovers import leftovers
    from flows.versioning.graph import GraphError

    try:
        found = leftovers(root)
    except (GraphError, OSError):
        # Stopping servers has to work in a clone that is broken otherwise.
        return
    if size := sum(one.size_bytes for one in found):
        print(f"left below runs/: {len(found)} things, {size / 2**20:.0f} MiB: ultraflux clean")


def status(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say which servers run and answer, and what still waits for MLflow (exit code 1: trouble)."""
    from flows.services.status import examine

    found = examine(project_root())
    if as_json:
        print_json(found.as_dict())
    else:
        found.print()
    raise typer.Exit(0 if found.well else 1)


def sync() -> None:
    """Upload run records that MLflow has not received yet."""
    from flows.tracking.sync import sync_now

    synced = sync_now(project_root())
    if synced.not_whole:
        raise fail(f"{synced.not_whole} records are not whole in MLflow; all others are", 1)
    going_on = synced.going_on
    print(f"{going_on} runs still going on" if going_on else "MLflow has everything")
