"""Which Prefect server this process talks to: the environment's, or the one of this clone."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from base64 import b64encode
from http.client import HTTPException, InvalidURL
from pathlib import Path

from flows.services.servers import ServiceError, prefect_environment, running_services
from flows.tracking.tier import LOOPBACK

API_URL = "PREFECT_API_URL"
ANSWER_TIMEOUT_S = 10.0
LOGIN_REFUSED = {401, 403}
_LONGEST_VERSION = 1000
"""Bytes."""


def one_spelling(url: str) -> str:
    """An address as this project writes it: localhost by its number, no slash at the end."""
    return re.sub(r"(?i)^http://localhost(?=[:/]|$)", f"http://{LOOPBACK}", url).rstrip("/")


def _with_login(url: str) -> urllib.request.Request:
    """A request with PREFECT_API_AUTH_STRING, where that is set."""
    request = urllib.request.Request(url)
    if login := os.environ.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", f"Basic {b64encode(login.encode()).decode()}")
    return request


def connect_to_prefect(root: Path | None) -> str:
    """Set the environment so that Prefect's client finds its server; call before importing it.

    Args:
        root: the clone whose `ultraflux up` may have started a server; None outside a clone.

    Returns:
        The API address.

    Raises:
        ServiceError: no server is named, it does not answer, or what answers is another program.
    """
    if root is not None:
        for service in running_services(root):
            # Named or not: where it is this clone's server, its login is known here.
            named = one_spelling(os.environ.get(API_URL, service.url)).removesuffix("/api")
            if service.name == "prefect" and named == service.url:
                os.environ.update(prefect_environment(root, service.port))
    if API_URL not in os.environ:
        raise ServiceError(
            "no Prefect server: start one with `ultraflux up --workers`, or set PREFECT_API_URL"
        )
    url = os.environ[API_URL].rstrip("/")
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=ANSWER_TIMEOUT_S):
            pass
        asked = _with_login(f"{url}/admin/version")
        with urllib.request.urlopen(asked, timeout=ANSWER_TIMEOUT_S) as answer:
            if _is_version(answer.read(_LONGEST_VERSION)):
                return url
    except urllib.error.HTTPError as problem:
        if problem.code in LOGIN_REFUSED:
            raise ServiceError(
                f"PREFECT_API_URL = {url}: the server asks for another login: take it from "
                "runs/services/clients.env of the clone that started it (set -a; . clients.env), "
                "or set PREFECT_API_AUTH_STRING"
            ) from None
        raise ServiceError(f"PREFECT_API_URL = {url}: the server says {problem}") from None
    # Before the next: a connection that is closed without a word is of both kinds.
    except (OSError, ValueError, InvalidURL) as problem:
        reason = getattr(problem, "reason", problem)
        raise ServiceError(
            f"PREFECT_API_URL = {url}: no Prefect server answers ({reason})"
        ) from None
    except HTTPException:
        pass
    raise ServiceError(
        f"PREFECT_API_URL = {url}: what answers there is no Prefect server; its API's address ends "
        "with /api"
    )


def _is_version(answer: bytes) -> bool:
    """Whether it is what a Prefect server says of its version: a string of JSON."""
    try:
        return isinstance(json.loads(answer), str)
    except ValueError:
        return False
