"""Workers work for the server that is meant, or a line says so; `down` stops them in any case."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from flows.records.records import write_json
from flows.services.clone_processes import is_running
from flows.services.prefect_connection import connect_to_prefect, one_spelling
from flows.services.servers import Service, ServiceError, free_port, remember, services_dir
from flows.services.workers import POOLS, Worker, running_workers, start_workers

Typed = Callable[..., subprocess.CompletedProcess[str]]
HERE = "http://127.0.0.1:4200/api"


@pytest.mark.parametrize(
    ("server", "project", "limit", "asked", "said"),
    [
        ("http://127.0.0.1:4300/api", "mine", None, None, "works for http://127.0.0.1:4300/api, p"),
        (HERE, "other", None, None, f"works for {HERE}, project other"),
        (HERE, "mine", 2, 1, "takes 2 runs at once"),
        (HERE, "mine", None, 1, "takes any number of runs at once"),
    ],
)
def test_workers_that_work_elsewhere_or_otherwise_are_not_counted_and_said(
    toy: Path,
    begin_sleeper: Callable[..., psutil.Process],
    monkeypatch: pytest.MonkeyPatch,
    typed: Typed,
    server: str,
    project: str,
    limit: int | None,
    asked: int | None,
    said: str,
) -> None:
    names = {pool: f"machine-{pool}-1" for pool in POOLS}
    pid = begin_sleeper(toy, *names.values()).pid
    known = [Worker(pool, name, pid, "", server, project, limit) for pool, name in names.items()]
    write_json(services_dir(toy) / "workers.json", [asdict(worker) for worker in known])
    assert running_workers(toy) == known
    monkeypatch.setenv("PREFECT_API_URL", HERE.replace("127.0.0.1", "localhost") + "/")
    monkeypatch.setenv("ULTRAFLUX_PROJECT", "mine")
    with pytest.raises(ServiceError, match=f"^worker pipelines of this clone {said}") as found:
        start_workers(toy, limit=asked)
    assert str(found.value).endswith("stop it first with `ultraflux down`")
    assert f"worker gpu: runs for {server} (pid {pid}" in typed(toy, "status").stdout


def test_the_clones_own_server_is_known_however_its_address_is_spelt(
    toy: Path, begin_sleeper: Callable[..., psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    server = begin_sleeper(toy, "-m prefect server start", "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    remember(toy, Service("prefect", url, server.pid, ""))
    for named in (f"{url}/api/", f"http://localhost:{port}/api", f"http://LOCALHOST:{port}", url):
        monkeypatch.setenv("PREFECT_API_URL", named)
        with pytest.raises(ServiceError, match=f"^PREFECT_API_URL = {url}/api: no Prefect server"):
            connect_to_prefect(toy)
    others = ("https://localhost:1/api", "http://localhost.example:1/api", "http://[::1]:1/api")
    assert [one_spelling(other) for other in others] == list(others)


def test_down_stops_everything_also_where_its_notes_cannot_be_removed(
    toy: Path,
    begin_sleeper: Callable[..., psutil.Process],
    hold: Callable[[Path], None],
    typed: Typed,
) -> None:
    worker = begin_sleeper(toy, "machine-gpu-1")
    server = begin_sleeper(toy, "-m mlflow server", "--port", "51234")
    known = [asdict(Worker("gpu", "machine-gpu-1", worker.pid, ""))]
    write_json(services_dir(toy) / "workers.json", known)
    remember(toy, Service("mlflow", "http://127.0.0.1:51234", server.pid, ""))
    hold(services_dir(toy))
    done = typed(toy, "down")
    assert not is_running(worker)
    assert not is_running(server)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "stopped worker gpu",
        "stopped mlflow (http://127.0.0.1:51234)",
    ]
    assert done.stderr.splitlines() == [
        f"error: {services_dir(toy) / name} could not be removed; nothing in it runs any more"
        for name in ("workers.json", "services.json")
    ]
