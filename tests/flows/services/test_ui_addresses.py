"""Where links to runs lead: a server that somebody named, or one that runs here; else nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.services.ui_addresses import mlflow_ui, prefect_ui
from flows.tracking.run_pages import flow_run_url


@pytest.mark.parametrize(
    ("named", "address"),
    [
        (None, None),
        ("sqlite:////somewhere.db", None),
        ("http://tracking:5000/", "http://tracking:5000"),
        ("https://tracking/mlflow", "https://tracking/mlflow"),
    ],
)
def test_mlflow_links_lead_to_a_server_only(
    tmp_path: Path, named: str | None, address: str | None
) -> None:
    given = {} if named is None else {"MLFLOW_TRACKING_URI": named}
    assert mlflow_ui(tmp_path, given) == address


def test_prefect_links_lead_to_the_pages_beside_the_api(tmp_path: Path) -> None:
    assert prefect_ui(tmp_path, {}) is None
    for named in ("http://flows:4200/api", "http://flows:4200/api/"):
        ui = prefect_ui(tmp_path, {"PREFECT_API_URL": named})
        assert ui == "http://flows:4200"
        assert flow_run_url(ui, "f1") == "http://flows:4200/runs/flow-run/f1"
