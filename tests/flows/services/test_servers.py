"""Real servers: up, healthy, taken ports, down."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from flows.environment import pool_name, project_name
from flows.records.records import write_json
from flows.running.guarded_process import GuardedProcess
from flows.services import servers as services
from flows.services import workers
from flows.services.clone_processes import is_running
from flows.services.status import examine
from flows.tracking import tier

Sleeper = Callable[..., psutil.Process]


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


@pytest.mark.parametrize(
    ("prefect", "mlflow", "said"),
    [(4300, 4300, "--mlflow-port 4300: prefect"), (5000, None, "--mlflow-port 5000: prefect")],
)
def test_two_servers_on_one_port_are_refused_before_anything_starts(
    toy: Path, prefect: int, mlflow: int | None, said: str
) -> None:
    with pytest.raises(services.ServiceError, match=f"^{said} is to listen there"):
        services.up(toy, prefect_port=prefect, mlflow_port=mlflow)
    assert services.known_services(toy) == []
    assert not (toy / "runs" / "logs").exists()


HOSTILE = {"Origin": "http://evil.example", "Host": "evil.example"}
"""What a page that somebody opens in a browser of this machine makes it send."""
STRANGERS = [{}, HOSTILE, {"Origin": "http://evil.example"}, {"Authorization": "Basic eA=="}]
RUN = {"parameters": {"stage": "select"}, "job_variables": {"command": "touch /tmp/was-here"}}
ASKED = {
    "prefect": [
        ("POST", "/api/deployments/filter", {}),
        ("POST", "/api/flow_runs/filter", {}),
        ("POST", f"/api/deployments/{uuid4()}/create_flow_run", RUN),
        ("GET", "/api/admin/settings", None),
        ("GET", "/api/csrf-token?client=page", None),
        ("DELETE", f"/api/flow_runs/{uuid4()}", None),
        ("POST", "/api/variables/name/system-health", {}),
    ],
    "mlflow": [
        ("POST", "/api/2.0/mlflow/experiments/search", {"max_results": 10}),
        ("POST", "/api/2.0/mlflow/experiments/create", {"name": "page"}),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts?path=/", None),
        ("GET", "/ajax-api/2.0/mlflow/experiments/search?max_results=1", None),
        ("POST", "/graphql", {"query": "{ test { output } }"}),
        ("GET", "/", None),
    ],
}


def refuses_strangers(client: httpx.Client, name: str) -> None:
    """Neither a page nor another account of the machine gets anything."""
    for method, path, body in ASKED[name]:
        for headers in STRANGERS:
            answer = client.request(method, path, json=body, headers=headers)
            assert answer.status_code in {401, 403}, (name, path, headers, answer.text[:200])
            assert "evil" not in answer.headers.get("access-control-allow-origin", "")
            assert answer.headers.get("access-control-allow-origin") != "*"
        asked = {"Access-Control-Request-Method": "POST", "Origin": "http://evil.example"}
        answer = client.request("OPTIONS", path, headers=asked)
        assert answer.headers.get("access-control-allow-origin") in {None, str(client.base_url)}
    if name == "prefect":
        for path in ("/api/events/in", "/api/events/out", "/api/logs/out"):
            url = f"{client.base_url}{path}".replace("http", "ws", 1)
            with pytest.raises(WebSocketException):
                talk(url)


PAGES = ("/", "/version", "/metrics", "/signup", "/docs", "/redoc", "/graphql", "/ui-settings")
API = (
    "/api/health",
    "/api/ready",
    "/api/version",
    "/api/docs",
    "/api/admin/version",
    "/api/flows/x",
)
SLOW = {"/openapi.json"}
"""Prefect needs two seconds of a core for it."""


def answers_without_login_what_is_listed(client: httpx.Client, name: str, root: Path) -> None:
    """SECURITY.md names what is answered, and nothing else."""
    text = (root / "SECURITY.md").read_text()
    (row,) = re.findall(rf"(?mi)^\| {name}: API, .*$", text)
    listed = set(re.findall(r"`(/[^`]*)`", row)) - SLOW
    asked = {*listed, *PAGES, *API, *(path.partition("?")[0] for _, path, _ in ASKED[name])}
    closed = {401, 403, 404, 405}
    assert {path for path in asked if client.get(path).status_code not in closed} == listed


def talk(url: str) -> None:
    """Send a websocket an event and hear its answer."""
    with connect(url, proxy=None) as socket_:
        socket_.send(json.dumps({"id": str(uuid4()), "event": "page"}))
        socket_.recv(timeout=30)


def lets_in_who_logs_in(client: httpx.Client, name: str, root: Path) -> None:
    known = tier.own_secrets(root)
    password = known.prefect_login if name == "prefect" else known.mlflow_admin
    path = {"prefect": "/api/admin/settings", "mlflow": "/"}[name]
    answer = client.get(path, auth=("admin", password))
    assert answer.status_code == 200
    if name == "prefect":
        settings = answer.json()["server"]
        # Its pages ask this before they call their analytics host.
        assert settings["analytics_enabled"] is False
        # A form of another page, even from a browser that has logged in.
        posted = client.post("/api/flow_runs/filter", json={}, auth=("admin", password))
        assert posted.status_code == 403
    for file in ("secrets.json", "clients.env"):
        path_ = tier.services_dir(root) / file
        assert stat.S_IMODE(path_.stat().st_mode) == 0o600


def test_up_gives_two_healthy_servers_again_the_same_ones_and_down_stops_them(
    toy: Path, root: Path
) -> None:
    ports = {"prefect_port": services.free_port(), "mlflow_port": services.free_port()}
    started = services.up(toy, **ports)
    try:
        assert [service.name for service in started] == ["mlflow", "prefect"]
        for service in started:
            with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
                refuses_strangers(client, service.name)
                answers_without_login_what_is_listed(client, service.name, root)
                lets_in_who_logs_in(client, service.name, toy)
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


# A server like uvicorn's with workers: the one that listens outlives a kill of its parent.
LEADER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
time.sleep(600)
"""
WORKER = """
import socket, sys, time
with socket.socket() as listens:
    listens.bind(("127.0.0.1", int(sys.argv[1])))
    listens.listen()
    time.sleep(600)
"""


def test_workers_of_a_server_that_was_killed_do_not_keep_its_port(
    toy: Path, tmp_path: Path
) -> None:
    def begun(folder: Path) -> tuple[psutil.Process, int]:
        port = services.free_port()
        command = [sys.executable, "-c", LEADER, WORKER, str(port), "-m mlflow server"]
        url = f"http://127.0.0.1:{port}"
        services.remember(toy, services.start_daemon(toy, "mlflow", url, command, {}, cwd=folder))
        (service,) = services.known_services(toy)
        deadline = time.monotonic() + 60
        while services.port_is_free(port):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return psutil.Process(service.pid), port

    leader, port = begun(toy)
    services.end_orphans(toy)
    assert not services.port_is_free(port)
    leader.kill()
    leader.wait(60)
    assert not services.port_is_free(port)
    services.end_orphans(toy)
    assert services.port_is_free(port)
    # In another folder it is nobody's of this clone, whatever the number says.
    foreign, port = begun(tmp_path)
    family = foreign.children()
    foreign.kill()
    foreign.wait(60)
    assert services.down(toy) == []
    assert not services.port_is_free(port)
    for process in family:
        process.kill()


def test_a_copied_clone_owns_nothing_of_the_original_and_a_moved_one_all(
    toy: Path, tmp_path: Path, begin_sleeper: Sleeper
) -> None:
    server = begin_sleeper(toy, "-m mlflow server", "--port", "51234")
    worker = begin_sleeper(toy, "machine-gpu-1")
    url = "http://127.0.0.1:51234"
    services.remember(toy, services.Service("mlflow", url, server.pid, ""))
    known = [asdict(workers.Worker("gpu", "machine-gpu-1", worker.pid, ""))]
    write_json(services.services_dir(toy) / "workers.json", known)
    copy = shutil.copytree(toy, tmp_path / "copy", symlinks=True)
    assert services.running_services(copy) == []
    assert services.down(copy) == []
    assert workers.stop_workers(copy) == []
    assert is_running(server)
    assert is_running(worker)
    moved = toy.rename(tmp_path / "moved")
    assert [one.pid for one in workers.stop_workers(moved)] == [worker.pid]
    assert [one.pid for one in services.down(moved)] == [server.pid]
    assert not is_running(server)
    assert not is_running(worker)


@pytest.mark.parametrize("notes", [None, "", "[{"])
def test_servers_and_workers_whose_notes_are_gone_are_found_and_stopped(
    toy: Path, notes: str | None, begin_sleeper: Sleeper
) -> None:
    port = services.free_port()
    server = begin_sleeper(toy, "-m prefect server start", "--port", str(port))
    pool = pool_name(project_name(toy), "gpu")
    worker = begin_sleeper(toy, *workers.worker_command(pool, "machine-gpu-1"))
    # A run's own server ends with the run: its launcher leads the session.
    launched = GuardedProcess(["sh", "-c", "sleep 600", "-m prefect server start"], cwd=toy)
    try:
        if notes is not None:
            for name in ("services.json", "workers.json"):
                place = services.services_dir(toy) / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(notes)
        found = examine(toy)
        url = f"http://127.0.0.1:{port}"
        assert [(one.name, one.url, one.pid) for one in found.servers] == [
            ("prefect", url, server.pid)
        ]
        assert [(one.pool, one.state) for one in found.workers] == [("gpu", "runs")]
        with pytest.raises(services.ServiceError, match=r"prefect at .*ultraflux down"):
            services.up(toy)
        assert [one.pid for one in workers.stop_workers(toy)] == [worker.pid]
        assert [one.pid for one in services.down(toy)] == [server.pid]
        assert launched.poll() is None
    finally:
        launched.stop()


@pytest.mark.slow
def test_up_repairs_a_server_of_which_one_process_was_killed(toy: Path) -> None:
    ports = {"prefect_port": services.free_port(), "mlflow_port": services.free_port()}
    before = {one.name: one for one in services.up(toy, **ports)}
    try:
        leaders = [psutil.Process(service.pid) for service in before.values()]
        for leader in leaders:
            leader.kill()
        psutil.wait_procs(leaders, timeout=60)
        after = services.up(toy, **ports)
        assert {one.name: one.url for one in after} == {k: v.url for k, v in before.items()}
        assert not {one.pid for one in after} & {one.pid for one in before.values()}
    finally:
        services.down(toy)
    assert all(services.port_is_free(port) for port in ports.values())


def test_a_reused_pid_is_not_taken_for_a_server(toy: Path) -> None:
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


def command(
    project: Path, *words: str, before: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """`ultraflux ...` in a project."""
    return subprocess.run(
        [*before, sys.executable, "-m", "flows.cli", *words],
        cwd=project,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def note(project: Path, name: str, text: str) -> Path:
    place = tier.services_dir(project) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return place


def test_a_persons_job_in_a_session_of_a_servers_number_goes_on(toy: Path) -> None:
    """Numbers of processes are given anew: after a restart a server's is that of a shell."""
    shell = subprocess.Popen(
        ["sh", "-c", "sleep 300 >&- & echo $!"],
        cwd=toy,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    job = psutil.Process(int(shell.communicate(timeout=60)[0]))
    try:
        for mark in ("", "0" * 32):
            url = "http://127.0.0.1:51234"
            services.remember(toy, services.Service("mlflow", url, shell.pid, "", mark))
            done = command(toy, "down")
            assert (done.returncode, done.stdout) == (0, "nothing was running\n")
            assert is_running(job)
    finally:
        job.kill()


def test_servers_that_may_not_be_looked_at_stay_noted_and_are_no_success(
    toy: Path, begin_sleeper: Sleeper
) -> None:
    blind = ("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace")
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can look away")
    server = begin_sleeper(toy, "-m mlflow server", "--port", "51234")
    worker = begin_sleeper(toy, "machine-gpu-1")
    services.remember(toy, services.Service("mlflow", "http://127.0.0.1:51234", server.pid, ""))
    known = [asdict(workers.Worker("gpu", "machine-gpu-1", worker.pid, ""))]
    write_json(services.services_dir(toy) / "workers.json", known)
    unseen = {f"mlflow (process {server.pid})", f"worker gpu (process {worker.pid})"}
    for typed in ("status", "down"):
        done = command(toy, typed, before=blind)
        assert done.returncode == 1
        lines = (done.stdout + done.stderr).splitlines()
        said = {line.removeprefix("error: ").partition(" may not")[0] for line in lines}
        assert unseen <= said, lines
        assert "died" not in done.stdout
        assert "nothing was running" not in done.stdout
    done = command(toy, "up", before=blind)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "mlflow (process" in done.stderr
    assert [one.pid for one in workers.stop_workers(toy)] == [worker.pid]
    assert [one.pid for one in services.down(toy)] == [server.pid]


@pytest.mark.parametrize("options", [[], ["--served"]])
def test_a_project_name_that_is_none_is_refused_before_anything_starts(
    toy: Path, options: list[str]
) -> None:
    done = command(toy, "up", *options, ULTRAFLUX_PROJECT="my project")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "ULTRAFLUX_PROJECT='my project': use 1 to 63 letters" in done.stderr
    assert services.known_services(toy) == []
    assert not (toy / "runs" / "logs").exists()


SERVICE = '{"name": "mlflow", "url": "http://127.0.0.1:1", "pid": 4194305, "log": ""}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("services.json", "[1]"),
        pytest.param("services.json", '{"name": "prefect"}', marks=pytest.mark.slow),
        ("services.json", '[{"name": "prefect"}]'),
        pytest.param("services.json", SERVICE.replace(":1", "").join("[]"), marks=pytest.mark.slow),
        pytest.param(
            "services.json", SERVICE.replace("4194305", "-1").join("[]"), marks=pytest.mark.slow
        ),
        pytest.param("workers.json", "[1]", marks=pytest.mark.slow),
        ("workers.json", '[{"pool": "gpu", "name": "x", "pid": 0, "log": ""}]'),
    ],
)
def test_notes_of_another_shape_count_as_missing_and_are_named(
    toy: Path, name: str, text: str
) -> None:
    place = note(toy, name, text)
    for typed in ("status", "down"):
        done = command(toy, typed)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{place}: ")
        assert "counts as missing" in done.stderr
    assert not place.exists()


def test_an_entry_of_another_shape_costs_itself_alone(toy: Path) -> None:
    newer = SERVICE.replace("}", ', "newer": 1}')
    note(toy, "services.json", f"[1, {newer}, null]")
    assert [service.name for service in services.known_services(toy)] == ["mlflow"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("served.json", '{"prefect_port": 1}', "postgres_port: Field required"),
        ("secrets.json", '{"superuser": "x"}', "prefect_database: Field required"),
        pytest.param("secrets.json", "null", "holds nothing", marks=pytest.mark.slow),
    ],
)
def test_a_tier_or_passwords_of_another_shape_are_one_line_and_down_works(
    toy: Path, name: str, text: str, said: str
) -> None:
    place = note(toy, name, text)
    ports = [str(services.free_port()) for _ in range(2)]
    done = command(toy, "up", "--prefect-port", ports[0], "--mlflow-port", ports[1])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert str(place) in done.stderr
    assert said in done.stderr
    done = command(toy, "down")
    assert (done.returncode, done.stdout) == (0, "nothing was running\n")


def test_a_tier_of_newer_code_is_read_as_far_as_it_is_known(toy: Path) -> None:
    note(toy, "served.json", '{"postgres_port": 5, "newer": 1}')
    assert tier.served_tier(toy) == tier.ServedTier(postgres_port=5)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\n\r\nok"])
def test_another_program_at_the_address_of_prefect_is_one_line(
    toy: Path, answer: bytes, begin_sleeper: Sleeper
) -> None:
    def talk_to_everybody(listens: socket.socket) -> None:
        with suppress(OSError):
            while True:
                caller, _ = listens.accept()
                with caller:
                    caller.recv(4096)
                    caller.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listens:
        url = f"http://127.0.0.1:{listens.getsockname()[1]}"
        threading.Thread(target=talk_to_everybody, args=(listens,), daemon=True).start()
        for typed in ("deploy", "submit"):
            done = command(toy, typed, PREFECT_API_URL=f"{url}/api")
            assert done.returncode in {1, 2}
            assert done.stderr.splitlines() == [
                f"error: PREFECT_API_URL = {url}/api: what answers there is no Prefect server; "
                "its API's address ends with /api"
            ]
        server = begin_sleeper(toy, "-m mlflow server", "--port", url.rpartition(":")[2])
        services.remember(toy, services.Service("mlflow", url, server.pid, ""))
        (found,) = examine(toy).servers
        assert found.state == ("healthy" if b"200" in answer else "no answer")
