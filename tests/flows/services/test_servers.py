"""Real servers: up, healthy, taken ports, down."""

from __future__ import annotations

import socket
import subprocess
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.services import servers as services


def test_a_taken_port_is_one_clear_line_and_nothing_is_started(toy: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                "ultraflux",
                "up",
                "--prefect-port",
                str(port),
                "--mlflow-port",
                str(services.free_port()),
            ],
            cwd=toy,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"port {port}" in done.stderr
    assert "--prefect-port" in done.stderr
    assert services.running_services(toy) == []


def test_up_gives_two_healthy_servers_again_the_same_ones_and_down_stops_them(toy: Path) -> None:
    ports = {"prefect_port": services.free_port(), "mlflow_port": services.free_port()}
    started = services.up(toy, **ports)
    try:
        assert [service.name for service in started] == ["mlflow", "prefect"]
        for service in started:
            with urllib.request.urlopen(service.url, timeout=10) as page:
                assert page.status == 200
            connections = psutil.Process(service.pid).net_connections()
            family = psutil.Process(service.pid).children(recursive=True)
            for process in family:
                connections += process.net_connections()
            listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
            assert listening == {"127.0.0.1"}
        assert services.up(toy, **ports) == started
        assert services.up(toy) == started
        with pytest.raises(services.ServiceError, match=r"prefect runs at .*ultraflux down"):
            services.up(toy, prefect_port=services.free_port())
    finally:
        stopped = services.down(toy)
    assert {service.name for service in stopped} == {"mlflow", "prefect"}
    assert not any(psutil.pid_exists(service.pid) for service in started)
    assert services.running_services(toy) == []
    assert all(services.port_is_free(port) for port in ports.values())


def test_a_reused_pid_is_not_taken_for_a_server(toy: Path) -> None:
    import os

    state = services.services_dir(toy) / "services.json"
    state.parent.mkdir(parents=True)
    state.write_text(
        f'[{{"name": "prefect", "url": "http://127.0.0.1:4200", "pid": {os.getpid()}, "log": ""}}]'
    )
    assert services.running_services(toy) == []
    assert services.down(toy) == []


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_commands_bind_to_loopback_only(toy: Path, name: str) -> None:
    command = services.prefect_command(1) if name == "prefect" else services.mlflow_command(toy, 1)
    assert command[command.index("--host") + 1] == "127.0.0.1"
