"""Where a person finds a run: pages of the MLflow and Prefect servers that this project uses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flows.services.prefect_connection import API_URL
from flows.services.servers import running_services


def mlflow_ui(root: Path, environment: Mapping[str, str] = os.environ) -> str | None:
    """Address of the MLflow UI that shows this project's runs; None while no server runs."""
    named = environment.get("MLFLOW_TRACKING_URI", "")
    if named.startswith(("http://", "https://")):
        return named.rstrip("/")
    return _own(root, "mlflow")


def prefect_ui(root: Path, environment: Mapping[str, str] = os.environ) -> str | None:
    """Address of the Prefect UI that shows this project's flow runs; None while no server runs."""
    named = environment.get(API_URL)
    return ui_of_api(named) if named else _own(root, "prefect")


def ui_of_api(address: str) -> str:
    """Address of the Prefect UI whose server has its API at `address`."""
    return address.rstrip("/").removesuffix("/api")


def _own(root: Path, name: str) -> str | None:
    urls = [service.url for service in running_services(root) if service.name == name]
    return urls[0] if urls else None
