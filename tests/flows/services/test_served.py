"""The served tier with real servers: a pipeline on it, and each server killed in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_project
import yaml

from flows.records.records import all_records, read_json
from flows.services import postgres, served
from flows.services import servers as services
from flows.services.clone_processes import is_running
from flows.tracking import tier
from flows.versioning import graph as versioning

pytestmark = pytest.mark.slow

PATIENCE_S = 1800.0


@dataclass(frozen=True)
class Project:
    """A clone in the served tier."""

    root: Path

    @property
    def tier(self) -> tier.ServedTier:
        found = tier.served_tier(self.root)
        assert found is not None
        return found

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        log = self.root.parent / f"{'-'.join(arguments[:1])}.log"
        with log.open("a") as output:
            return subprocess.Popen(
                ["ultraflux", *arguments],
                cwd=self.root,
                env=_environment(),
                stdout=output,
                stderr=output,
                text=True,
            )

    def ultraflux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["ultraflux", *arguments],
            cwd=self.root,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self, name: str) -> None:
        """SIGKILL a server with everything it started."""
        service = {s.name: s for s in services.running_services(self.root)}[name]
        process = psutil.Process(service.pid)
        family = [process, *process.children(recursive=True)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=60)

    def query(self, database: str, text: str) -> list[tuple[Any, ...]]:
        import psycopg

        secrets = tier.Secrets(**read_json(tier.services_dir(self.root) / "secrets.json"))
        role = tier.DATABASES[database]
        with psycopg.connect(
            host="127.0.0.1",
            port=self.tier.postgres_port,
            user=role,
            password=secrets.database_password(role),
            dbname=database,
        ) as connection:
            return connection.execute(text).fetchall()  # type: ignore[arg-type]

    def set(self, section: str, key: str, value: object) -> None:
        path = self.root / "params.yaml"
        values = yaml.safe_load(path.read_text())
        values[section][key] = value
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def flow_states(self) -> list[str]:
        """States of the pipeline's Prefect runs, oldest first."""
        rows = self.query("prefect", "select state_type from flow_run order by created")
        return [str(row[0]) for row in rows]

    def mlflow_runs(self) -> list[tuple[str, str]]:
        """Name and status of every MLflow run."""
        return [
            (str(name), str(status))
            for name, status in self.query(
                "mlflow", "select name, status from runs order by start_time"
            )
        ]


def _environment() -> dict[str, str]:
    """This process's, without what other tests may have set for clients of their servers."""
    prefixes = ("PREFECT_API", "PREFECT_HOME", "PREFECT_SERVER_DATABASE", "MLFLOW_TRACKING")
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def project(small_clone: Callable[..., Path]) -> Iterator[Project]:
    try:
        postgres.find_programs()
    except services.ServiceError as problem:
        pytest.skip(str(problem))
    if missing := served.missing_packages():
        pytest.skip(f"not installed: {', '.join(missing)}")
    made = Project(small_clone("served"))
    ports = {"--prefect-port": services.free_port(), "--mlflow-port": services.free_port()}
    words = [str(word) for pair in ports.items() for word in pair]
    try:
        made.ultraflux("up", "--served", *words)
        yield made
    finally:
        services.down(made.root)


def during_a_run(project: Project, stage: str, fault: Callable[[], None]) -> int:
    """Run the pipeline as a Prefect flow and cause a fault while `stage` runs."""
    log = project.root / "runs" / "logs" / f"{stage}.log"
    log.unlink(missing_ok=True)
    run = project.start("run", "--engine", "prefect")
    try:
        wait_until(lambda: log.exists() or run.poll() is not None, f"{stage} never ran")
        assert run.poll() is None, (project.root.parent / "run.log").read_text()
        fault()
        return run.wait(PATIENCE_S)
    finally:
        if run.poll() is None:
            run.kill()
            run.wait()


def test_the_servers_listen_on_loopback_only_and_hide_their_passwords(project: Project) -> None:
    words = read_json(tier.services_dir(project.root) / "secrets.json").values()
    running = services.running_services(project.root)
    assert [service.name for service in running] == ["postgres", "prefect", "mlflow"] or [
        service.name for service in running
    ] == ["postgres", "mlflow", "prefect"]
    for service in running:
        process = psutil.Process(service.pid)
        family = [process, *process.children(recursive=True)]
        open_ports = [c for p in family for c in p.net_connections() if c.status == "LISTEN"]
        assert {c.laddr.ip for c in open_ports} == {"127.0.0.1"}, service.name
        command_lines = " ".join(" ".join(p.cmdline()) for p in family)
        logged = Path(service.log).read_text(errors="replace")
        assert not any(word in command_lines or word in logged for word in words), service.name
    status = json.loads(project.ultraflux("status", "--json"))
    assert {one["name"]: one["state"] for one in status["servers"]} == {
        "postgres": "healthy",
        "prefect": "healthy",
        "mlflow": "healthy",
    }


def test_mlflow_refuses_who_does_not_log_in(project: Project) -> None:
    address = f"http://127.0.0.1:{project.tier.mlflow_port}"
    for path in ("/", "/api/2.0/mlflow/experiments/search?max_results=1"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address + path, timeout=60)
        assert refused.value.code == 401


def test_a_role_reaches_its_own_databases_only(project: Project) -> None:
    import psycopg

    secrets = tier.Secrets(**read_json(tier.services_dir(project.root) / "secrets.json"))
    login = {"host": "127.0.0.1", "port": project.tier.postgres_port, "user": "prefect"}
    for password, database in ((secrets.prefect_database, "mlflow"), ("wrong", "prefect")):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(**login, password=password, dbname=database)  # type: ignore[arg-type]


def test_a_second_up_changes_nothing_and_other_options_are_refused(project: Project) -> None:
    before = services.running_services(project.root)
    project.ultraflux("up")
    assert services.running_services(project.root) == before
    for words in (["--embedded"], ["--served", "--mlflow-port", "1"]):
        done = subprocess.run(
            ["ultraflux", "up", *words], cwd=project.root, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "ultraflux down" in done.stderr


def test_with_the_database_killed_and_started_again_a_run_ends_as_if_nothing_had_been(
    project: Project,
) -> None:
    def fault() -> None:
        project.kill("postgres")
        time.sleep(5)  # servers and clients notice
        project.ultraflux("up")

    assert during_a_run(project, "slices", fault) == 0
    graph = versioning.stage_graph(project.root)
    assert versioning.stale_stages(project.root, graph) == {}
    assert project.flow_states() == ["COMPLETED"]
    tasks = project.query("prefect", "select name, state_type from task_run")
    assert sorted(tasks) == sorted((name, "COMPLETED") for name in graph)
    project.ultraflux("sync")
    assert sorted(project.mlflow_runs()) == sorted((n, "FINISHED") for n in ("pipeline", *graph))
    points = project.query(
        "mlflow",
        "select m.step from metrics m join runs r using (run_uuid) "
        "where r.name = 'vae' and m.key = 'loss' order by m.step",
    )
    steps = small_project.SETTINGS["vae.steps"]
    assert [row[0] for row in points] == list(range(1, steps + 1))


def test_with_mlflow_killed_a_run_goes_on_and_its_records_arrive_later(project: Project) -> None:
    before = len(project.mlflow_runs())
    project.set("generate", "num_inference_steps", 3)
    assert during_a_run(project, "generate", lambda: project.kill("mlflow")) == 0
    assert "ultraflux sync" in (project.root.parent / "run.log").read_text()
    status = subprocess.run(
        ["ultraflux", "status", "--json"], cwd=project.root, capture_output=True, text=True
    )
    assert status.returncode == 1
    said = json.loads(status.stdout)
    assert {s["name"]: s["state"] for s in said["servers"]}["mlflow"] == "died"
    assert said["unsent"] > 0
    project.ultraflux("up")
    project.ultraflux("sync")
    assert json.loads(project.ultraflux("status", "--json"))["unsent"] == 0
    runs = project.mlflow_runs()
    ran = [r for r in all_records(project.root) if r.run.kind == "stage"]
    assert len(runs) == len(list(all_records(project.root))) > before
    assert {name for name, _ in runs[before:]} >= {"pipeline", "generate", "evaluate"}
    assert all(status == "FINISHED" for _, status in runs)
    assert len({record.mlflow_run_id for record in ran}) == len(ran)


def test_with_prefects_server_killed_the_run_goes_on_and_the_next_server_hears_how_it_ended(
    project: Project,
) -> None:
    def fault() -> None:
        project.kill("prefect")
        time.sleep(5)
        project.ultraflux("up")

    before = len(project.flow_states())
    project.set("generate", "num_inference_steps", 4)
    assert during_a_run(project, "generate", fault) == 0
    assert "goes on without it" in (project.root.parent / "run.log").read_text()
    assert project.flow_states()[before:] == ["COMPLETED"]
    graph = versioning.stage_graph(project.root)
    assert versioning.stale_stages(project.root, graph) == {}


def test_down_leaves_no_process_and_no_port_and_up_brings_everything_back(
    project: Project,
) -> None:
    runs, states = project.mlflow_runs(), project.flow_states()
    families = [
        member
        for service in services.running_services(project.root)
        for member in (
            psutil.Process(service.pid),
            *psutil.Process(service.pid).children(recursive=True),
        )
    ]
    said = project.ultraflux("down").splitlines()
    # What lies below runs/ is said last.
    stopped = [line for line in said if line.startswith("stopped")]
    assert stopped[-1].startswith("stopped postgres")
    assert not any(is_running(member) for member in families if member.is_running())
    ports = (project.tier.prefect_port, project.tier.mlflow_port, project.tier.postgres_port)
    assert all(services.port_is_free(port) for port in ports)
    log = (project.root / "runs" / "logs" / "postgres-server.log").read_text()
    assert log.rstrip().endswith("database system is shut down")
    project.ultraflux("up")
    assert (project.mlflow_runs(), project.flow_states()) == (runs, states)


def test_prefect_asks_for_a_password_where_it_was_told_to(project: Project) -> None:
    project.ultraflux("down")
    project.ultraflux("up", "--prefect-login")
    try:
        address = f"http://127.0.0.1:{project.tier.prefect_port}/api/admin/settings"
        # A question: a form is refused before, for want of its token.
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, timeout=60)
        assert refused.value.code == 401
        states = project.flow_states()
        # With nothing to do no server would hear of the run.
        project.set("generate", "num_inference_steps", 5)
        assert project.start("run", "--engine", "prefect").wait(PATIENCE_S) == 0
        assert project.flow_states() == [*states, "COMPLETED"]
    finally:
        project.ultraflux("down")
