"""`ultraflux deploy`: pools, deployments and automations from git onto a Prefect server."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.command_line import fail, project_root, refusing

EPILOG = (
    "The server is that of [bold]ultraflux up[/], or the one that PREFECT_API_URL names. "
    "Names on it carry the project: one of this clone's own, or ULTRAFLUX_PROJECT, which clones "
    "that work together share. Then: [bold]ultraflux submit[/], or "
    "[bold]ultraflux run --engine pools[/]."
)


def deploy(
    workers: Annotated[
        bool, typer.Option("--workers", help="Start a worker per pool on this machine as well.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs that each of these workers takes at once (default: no limit)."
        ),
    ] = None,
    pools: Annotated[
        str, typer.Option(help="process, docker or kubernetes (conf/work-pools/).")
    ] = "process",
) -> None:
    """Create or update work pools, deployments and automations; twice is the same as once."""
    from flows import environment
    from flows.services.prefect_connection import connect_to_prefect
    from flows.services.servers import ServiceError

    if limit is not None and not workers:
        raise fail("--limit is for --workers")
    if workers and pools != "process":
        raise fail(f"--workers starts processes: not with --pools {pools}")
    root = project_root()
    environment.prepare()
    with refusing(ServiceError, code=1):
        url = connect_to_prefect(root)
    # Prefect reads its environment at import.
    from flows.pools.automations import AutomationInvalid
    from flows.pools.deployments import DeployFailed
    from flows.pools.deployments import deploy as apply
    from flows.pools.work_pools import PoolsInvalid
    from flows.services.workers import start_workers

    with refusing(DeployFailed, ServiceError, code=1), refusing(AutomationInvalid, PoolsInvalid):
        done = apply(root, pools)
        started = start_workers(root, limit=limit) if workers else []
    print(f"server       {url}")
    print(f"project      {done.project}")
    print(f"pools        {', '.join(done.pools)}")
    print(f"deployments  {', '.join(done.deployments)}")
    for applied in done.automations:
        print(f"automation   {applied.name}: {applied.outcome}")
    for worker in started:
        print(f"worker       {worker.pool} (log: {worker.log})")
