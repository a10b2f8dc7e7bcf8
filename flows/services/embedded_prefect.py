"""The Prefect server of one run (`ultraflux run --engine prefect`, `make run`); it ends with it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.running.guarded_process import GuardedProcess
from flows.services.servers import (
    Service,
    ServiceError,
    free_port,
    prefect_command,
    prefect_environment,
    running_services,
    wait_for_all,
)
from flows.tracking.tier import LOOPBACK as HOST
from flows.tracking.tier import served_tier

LOG_DRAIN_S = 10.0
nobody_listens = threading.Event()
"""Set when the server had ended before its run had, or the run was interrupted: what threads of
Prefect's client still hold goes nowhere."""


@contextmanager
def embedded_prefect(root: Path) -> Iterator[dict[str, str]]:
    """A Prefect server for the time of one run, where there is no other.

    PREFECT_API_URL in the environment wins (servers in containers or on another machine), then the
    server from `ultraflux up`.

    Yields:
        Environment variables for Prefect clients; already set in this process as well.

    Raises:
        ServiceEnded: the server's process ended before it answered.
        ServiceError: it does not answer, or the served tier's does not run.
    """
    if "PREFECT_API_URL" in os.environ:
        yield {}
        return
    running = {service.name: service for service in running_services(root)}
    if "prefect" in running:
        environment = prefect_environment(root, running["prefect"].port)
        os.environ.update(environment)
        yield environment
        return
    if (tier := served_tier(root)) is not None:
        raise ServiceError(
            f"the Prefect server of this project (port {tier.prefect_port}) is not running: start "
            "it with `ultraflux up`, or go back to servers per run with `ultraflux up --embedded`"
        )
    port = free_port()
    environment = prefect_environment(root, port)
    Path(environment["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    log = root / "runs" / "logs" / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # Guarded: a pipeline that is killed leaves no server behind.
        server = GuardedProcess(
            prefect_command(port), cwd=root, env=os.environ | environment, output=output
        )
    try:
        wait_for_all([Service("prefect", f"http://{HOST}:{port}", server.pid, str(log))])
        # Not before: whoever goes on without a server that never answered looks for none.
        os.environ.update(environment)
        try:
            yield environment
        except BaseException:
            # Its tasks say something yet, to a server that ends here.
            nobody_listens.set()
            raise
        finally:
            if server.poll() is None:
                _send_prefect_logs()
            if server.poll() is not None:
                nobody_listens.set()
    finally:
        server.stop()


def _send_prefect_logs() -> None:
    """Send what Prefect's client still holds; with the server gone it would retry for a minute."""
    if "prefect.logging.handlers" in sys.modules:
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=LOG_DRAIN_S)
