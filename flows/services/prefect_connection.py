"""Which Prefect server this process talks to: the environment's, or the one of this clone."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from flows.services.servers import ServiceError, prefect_environment, running_services

API_URL = "PREFECT_API_URL"
ANSWER_TIMEOUT_S = 10.0


def connect_to_prefect(root: Path | None) -> str:
    """Set the environment so that Prefect's client finds its server; call before importing it.

    Args:
        root: the clone whose `ultraflux up` may have started a server; None outside a clone.

    Returns:
        The API address.

    Raises:
        ServiceError: no server is named, or it does not answer.
    """
    if API_URL not in os.environ and root is not None:
        for service in running_services(root):
            if service.name == "prefect":
                os.environ.update(prefect_environment(root, int(service.url.rsplit(":", 1)[1])))
    if API_URL not in os.environ:
        raise ServiceError(
            "no Prefect server: start one with `ultraflux up --workers`, or set PREFECT_API_URL"
        )
    url = os.environ[API_URL]
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=ANSWER_TIMEOUT_S):
            return url
    except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError) as problem:
        reason = getattr(problem, "reason", problem)
        raise ServiceError(
            f"PREFECT_API_URL = {url}: no Prefect server answers ({reason})"
        ) from None
