"""A small real DVC project in a git repository, and a project with servers and workers."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Its loggers keep the stderr of the moment of the import, and fail once that is closed: a test that
# captures output must not be the first to import it.
import dvc  # noqa: F401
import psutil
import pytest

from flows.records.records import read_json
from flows.remote import data_remote
from flows.services import servers as services

TIMEOUT_S = 300

META = (
    "{pool: cpu, gpus: 0, cpus: 1, mem_gb: 0.1, est_minutes: 0.1, retries: 1, timeout_min: 1.0, "
    "resumable: false, gate: false}"
)
PARAMS = "project: {name: toy}\nvalue: 1\n"
# a -> b, a -> c, (b, c) -> d.
# b counts its runs, so that tests can see retries; a marker file makes it fail or hang.
DVC_YAML = f"""\
stages:
  a:
    cmd: cp params.yaml data/a
    deps: [source]
    params: [value]
    outs: [data/a]
    meta: {META}
  b:
    cmd: echo run >> b.runs; test -e b.hang && sleep 60; test ! -e b.fail && cp data/a data/b
    deps: [data/a]
    outs: [data/b]
    meta: {META}
  c:
    cmd: cat data/a source > data/c
    deps: [data/a, source]
    outs: [data/c]
    meta: {META}
  d:
    cmd: cat data/b data/c > data/d
    deps: [data/b, data/c]
    outs: [data/d]
    meta: {META}
"""


@pytest.fixture(scope="session")
def toy_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project that every `toy` is a copy of: Git and DVC need a second or two to make one."""
    project = tmp_path_factory.mktemp("template") / "toy"
    for folder in ("data", "mlflow", "runs"):
        (project / folder).mkdir(parents=True)
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "params.yaml").write_text(PARAMS)
    (project / "source").write_text("photographs\n")
    config = Path(__file__).resolve().parents[2] / "mlflow" / "tracking.yaml"
    (project / "mlflow" / "tracking.yaml").write_text(config.read_text())
    (project / ".gitignore").write_text("data\nruns\nb.*\n")
    for command in (
        ["git", "init", "-q"],
        ["dvc", "init", "-q"],
        ["git", "add", "."],
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "toy"],
    ):
        subprocess.run(command, cwd=project, check=True)
    return project


@pytest.fixture
def toy(toy_template: Path, tmp_path: Path) -> Path:
    """Root of the project."""
    project = shutil.copytree(toy_template, tmp_path / "toy", symlinks=True)
    # The index knows files by their inode and change time, which a copy has not kept.
    subprocess.run(["git", "update-index", "-q", "--refresh"], cwd=project, check=True)
    return project


@pytest.fixture
def tree_on_a_stick(toy: Path, tmp_path: Path) -> Iterator[None]:
    """A person's own worktree with a staged file, on a disk that is away during a test."""

    def git(*words: str, cwd: Path = toy) -> str:
        command = ["git", *words]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout

    tree, away = tmp_path / "on-a-stick", tmp_path / "away"
    git("worktree", "add", "-q", "--detach", str(tree))
    (tree / "mine").write_text("staged")
    git("add", "mine", cwd=tree)
    tree.rename(away)
    yield
    away.rename(tree)
    assert git("status", "--porcelain", cwd=tree) == "A  mine\n"


@pytest.fixture
def hold() -> Iterator[Callable[[Path], None]]:
    """Makes folders in which nothing can be made or removed until the test ends, also by root."""
    lock, free = ("chattr +i", "chattr -i") if os.geteuid() == 0 else ("chmod a-w", "chmod u+w")
    held: list[Path] = []

    def keep(folder: Path) -> None:
        program = lock.split()
        if shutil.which(program[0]) is None or subprocess.run([*program, str(folder)]).returncode:
            pytest.skip("nothing withstands this account here")
        held.append(folder)

    yield keep
    for folder in held:
        subprocess.run([*free.split(), str(folder)], check=True)


@pytest.fixture(scope="session")
def give_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts an empty MLflow store into a project, as its first upload would make it.

    MLflow takes seconds to make its tables; `test_uploader` lets it, in a project without a store.
    """
    made = tmp_path_factory.mktemp("store") / "mlflow.db"

    def give(project: Path) -> None:
        if not made.is_file():
            from mlflow import MlflowClient

            MlflowClient(f"sqlite:///{made}").search_experiments()
        place = project / "runs" / "services" / "mlflow.db"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, place)

    return give


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that every clone uses as its DVC remote."""
    folder = tmp_path / "share"
    folder.mkdir()
    monkeypatch.setenv(data_remote.REMOTE, str(folder))
    monkeypatch.setenv(data_remote.PATIENCE, "0")
    return folder


@dataclass(frozen=True)
class S3Server:
    """A server with a bucket `corpus`, and all that a client needs to know of it."""

    url: str
    log: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server on the loopback; its credentials are in the environment and nowhere else."""
    import boto3

    folder = tmp_path_factory.mktemp("s3")
    env = {
        "AWS_ACCESS_KEY_ID": "loopback-user-3a91",
        # Drawn, so that no copy of this file holds it.
        "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }
    # Whatever the machine is set up for.
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        (folder / name).touch()
        env[name] = str(folder / name)
    port, log = services.free_port(), folder / "s3.log"
    env["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(600):
            if not services.port_is_free(port):
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        boto3.client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            region_name=env["AWS_DEFAULT_REGION"],
        ).create_bucket(Bucket="corpus")
        yield S3Server(env["AWS_ENDPOINT_URL"], log, env)
    finally:
        server.terminate()
        server.wait()


@dataclass(frozen=True)
class PoolSite:
    """A project of trivial stages whose servers and workers run."""

    root: Path
    env: dict[str, str]

    def ultraflux(self, *arguments: str, cwd: Path | None = None) -> str:
        """Standard output of a command that must work."""
        done = self.attempt(*arguments, cwd=cwd)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    def attempt(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A finished command."""
        return subprocess.run(
            ["ultraflux", *arguments],
            cwd=cwd or self.root,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A question to the Prefect API."""
        from prefect.client.orchestration import SyncPrefectClient

        login = self.env["PREFECT_API_AUTH_STRING"]
        with SyncPrefectClient(self.env["PREFECT_API_URL"], auth_string=login) as client:
            method = "GET" if body is None else "POST"
            # With what the server asks of forms, too, which the client knows.
            answer = client._client.request(method, path, json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def runs(self, **states: list[str]) -> list[dict[str, Any]]:
        """Flow runs; `type=["RUNNING"]`: those in one of these states."""
        chosen = {"flow_runs": {"state": {k: {"any_": v} for k, v in states.items()}}}
        found: list[dict[str, Any]] = self.api("/flow_runs/filter", chosen if states else {})
        return found

    def states(self, run_id: str) -> list[str]:
        """Names of a flow run's states, the oldest first (of Pending ones the first)."""
        found = self.api(f"/flow_run_states/?flow_run_id={run_id}")
        names = [state["name"] for state in sorted(found, key=lambda s: s["timestamp"])]
        return [name for name in names if name != "Submitting"]

    def wait_for(self, question: Callable[[], Any], what: str) -> Any:
        """The first answer to `question` that is something."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if answer := question():
                return answer
            time.sleep(0.3)
        raise AssertionError(f"no {what} within {TIMEOUT_S} s")

    def stage_engine(self, stage: str) -> psutil.Process | None:
        """The flow run process above a stage that runs now."""
        for found in psutil.process_iter(["cmdline"]):
            command = found.info["cmdline"] or []
            if command[-3:] == ["stage", "run", stage] and any("ultraflux" in c for c in command):
                # One that ends while it is looked at runs no stage now.
                with contextlib.suppress(psutil.NoSuchProcess):
                    above = found.parents()
                    engine = [p for p in above if "prefect.engine" in " ".join(p.cmdline())]
                    if engine and found.cwd() == str(self.root):
                        return engine[0]
        return None

    def workers(self) -> dict[str, psutil.Process]:
        """This site's workers by pool."""
        known = read_json(services.services_dir(self.root) / "workers.json") or []
        return {worker["pool"]: psutil.Process(worker["pid"]) for worker in known}


@pytest.fixture(scope="module")
def pool_site(
    trivial_clone: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[dict[str, str]], PoolSite]]:
    """Starts the servers and workers of a clone with a chain of three stages."""
    made: list[PoolSite] = []

    def start(extra: dict[str, str]) -> PoolSite:
        root = trivial_clone(tmp_path_factory.mktemp("site"), 3)
        port = services.free_port()
        env = os.environ | {"PYTHONPATH": str(root)} | extra
        env["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        made.append(PoolSite(root, env))
        ports = ["--prefect-port", str(port), "--mlflow-port", str(services.free_port())]
        made[-1].ultraflux("up", *ports, "--workers")
        # As a shell elsewhere reads it; without the project's name, which is the only one there.
        clients = (services.services_dir(root) / "clients.env").read_text().splitlines()
        login = next(line for line in clients if line.startswith("PREFECT_API_AUTH_STRING="))
        env["PREFECT_API_AUTH_STRING"] = login.partition("=")[2]
        return made[-1]

    yield start
    for site in made:
        site.ultraflux("down")
