"""Stages on work pools whose workers share nothing with the pipeline but a commit and a remote."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.pools.remote_pool_runner import MOST_LOSSES
from flows.records.records import read_json
from flows.remote import data_remote
from flows.services import servers as services

pytestmark = pytest.mark.slow
TIMEOUT_S = 600
HANG = "import os, time\n\n(lambda: time.sleep(600) if os.path.exists('runs/hang') else None)()\n"


@dataclass(frozen=True)
class Site:
    """A server, the pipeline's clone, two clones with workers, and one without any of it."""

    pipeline: Path
    workers: tuple[Path, Path]
    single: Path
    env: dict[str, str]

    def attempt(self, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A finished command in a clone."""
        return subprocess.run(
            ["ultraflux", *arguments],
            cwd=root,
            env=self.env | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def ultraflux(self, root: Path, *arguments: str) -> str:
        """Standard output of a command that must work."""
        done = self.attempt(root, *arguments)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    def start(self) -> subprocess.Popen[str]:
        """The pipeline, running."""
        return subprocess.Popen(
            ["ultraflux", "run", "--engine", "pools", "--remote-data"],
            cwd=self.pipeline,
            env=self.env | {"PYTHONPATH": str(self.pipeline)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def api(self, path: str, body: dict[str, Any]) -> Any:
        """A question to the Prefect API."""
        from prefect.client.orchestration import SyncPrefectClient

        login = self.env["PREFECT_API_AUTH_STRING"]
        with SyncPrefectClient(self.env["PREFECT_API_URL"], auth_string=login) as client:
            answer = client._client.post(path, json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def flow_runs(self, *, of_stages: bool = True) -> list[dict[str, Any]]:
        """All flow runs of stages, or of pipelines."""
        found = self.api("/flow_runs/filter", {})
        return [run for run in found if ("stage" in run["tags"]) == of_stages]

    def state(self, run: dict[str, Any]) -> str:
        """Name of a flow run's present state."""
        (found,) = self.api("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        return str(found["state"]["name"])

    def reseed(self, seed: int) -> None:
        """Settings with which every stage has to run again."""
        for clone in (self.pipeline, self.single):
            values = yaml.safe_load((clone / "params.yaml").read_text())
            values["project"]["seed"] = seed
            (clone / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def hang(self, *, on: bool) -> None:
        """Whether copy1 hangs on the workers from now on."""
        for clone in self.workers:
            if on:
                (clone / "runs" / "hang").touch()
            else:
                (clone / "runs" / "hang").unlink()


@pytest.fixture(scope="module", params=["folder", "s3"])
def site(
    trivial_clone: Callable[[Path, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    pipeline = trivial_clone(folder, 3)
    stage = pipeline / "flows" / "stages" / "copy1.py"
    stage.write_text(stage.read_text().replace("import shutil\n", f"import shutil\n{HANG}"))
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, "commit", "-qam", "may hang"], cwd=pipeline, check=True)
    first, second, single = (folder / name for name in ("first", "second", "single"))
    for clone in (first, second, single):
        subprocess.run(["git", "clone", "-q", str(pipeline), str(clone)], check=True)
        (clone / "runs").mkdir(exist_ok=True)
    env = dict(os.environ)
    if request.param == "s3":
        env |= request.getfixturevalue("s3_server").env
        env[data_remote.REMOTE] = "s3://corpus/data"
    else:
        (folder / "share").mkdir()
        env[data_remote.REMOTE] = str(folder / "share")
    port = services.free_port()
    env["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    made = Site(pipeline, (first, second), single, env)
    ports = ["--prefect-port", str(port), "--mlflow-port", str(services.free_port())]
    try:
        made.ultraflux(pipeline, "up", *ports)
        # What a person does on the other machines: set -a; . clients.env
        clients = (services.services_dir(pipeline) / "clients.env").read_text().split()
        said = dict(line.split("=", 1) for line in clients)
        # Records come with the replies here, not over MLflow's server.
        env |= {name: said[name] for name in said if not name.startswith("MLFLOW_")}
        for clone in made.workers:
            made.ultraflux(clone, "deploy", "--workers", "--limit", "1")
        yield made
    finally:
        for clone in made.workers:
            for worker in (read_json(services.services_dir(clone) / "workers.json")) or []:
                end_family(worker["pid"])
        made.attempt(pipeline, "down")


def end_family(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.Error:
        return
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=30)


def stage_process(clones: tuple[Path, ...]) -> tuple[Path, psutil.Process] | None:
    """The clone and the flow run's process in which copy1 hangs."""
    for found in psutil.process_iter(["cmdline"]):
        try:
            command = found.info["cmdline"] or []
            if command[-3:] != ["stage", "run", "copy1"] or Path(found.cwd()) not in clones:
                continue
            for parent in found.parents():
                if "prefect.engine" in " ".join(parent.cmdline()):
                    return Path(found.cwd()), parent
        except psutil.Error:
            continue
    return None


def wait_for(question: Callable[[], Any], pipeline: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        assert pipeline.poll() is None, pipeline.communicate()[0]
        time.sleep(0.3)
    raise AssertionError(pipeline.communicate()[0])


def test_a_machine_that_is_gone_with_its_stage_costs_no_result_and_no_byte(site: Site) -> None:
    site.hang(on=True)
    pipeline = site.start()
    victim, engine = wait_for(lambda: stage_process(site.workers), pipeline)
    (other,) = [clone for clone in site.workers if clone != victim]
    (other / "runs" / "hang").unlink()
    children = engine.children(recursive=True)
    for worker in read_json(services.services_dir(victim) / "workers.json"):
        os.kill(worker["pid"], signal.SIGKILL)
    engine.kill()
    output, _ = pipeline.communicate(timeout=TIMEOUT_S)
    assert pipeline.returncode == 0, output
    # The launcher took the stage's processes with it.
    assert psutil.wait_procs(children, timeout=60)[1] == []
    # The heartbeat's automation scheduled that very run again.
    (run,) = [run for run in site.flow_runs() if run["name"] == "copy1"]
    assert run["state"]["type"] == "COMPLETED"
    assert run["run_count"] == 2

    site.ultraflux(site.single, "run")
    same_as_single(site)
    # The clones of the workers were told nothing by way of the file system.
    assert not (victim / "data" / "copy2").exists()
    before = len(site.flow_runs())
    site.ultraflux(site.pipeline, "run", "--engine", "pools", "--remote-data")
    assert len(site.flow_runs()) == before
    site.ultraflux(victim, "deploy", "--workers", "--limit", "1")
    (victim / "runs" / "hang").unlink()


def same_as_single(site: Site) -> None:
    """The pipeline's clone, after `dvc pull`, has lock and bytes of the single clone."""
    subprocess.run(["dvc", "pull", "-q"], cwd=site.pipeline, env=site.env, check=True)
    locks = [yaml.safe_load((c / "dvc.lock").read_text()) for c in (site.pipeline, site.single)]
    assert locks[0] == locks[1]
    for stage in locks[0]["stages"]:
        path = Path("data") / stage / "out"
        assert (site.pipeline / path).read_bytes() == (site.single / path).read_bytes()


def test_a_killed_flow_run_goes_to_the_pool_again_with_the_pipelines_settings(site: Site) -> None:
    site.reseed(77)
    site.hang(on=True)
    pipeline = site.start()
    _, engine = wait_for(lambda: stage_process(site.workers), pipeline)
    site.hang(on=False)
    engine.kill()
    output, _ = pipeline.communicate(timeout=TIMEOUT_S)
    assert pipeline.returncode == 0, output
    assert "copy1: lost with its worker" in output
    assert "sent to the pool again" in output
    done = [line for line in output.splitlines() if line.strip().startswith("done")]
    assert len(done) == 3, output
    site.ultraflux(site.single, "run")
    same_as_single(site)


def test_a_stage_that_every_worker_loses_fails_and_says_so(site: Site) -> None:
    site.reseed(78)
    site.hang(on=True)
    pipeline = site.start()
    retries = yaml.safe_load((site.pipeline / "dvc.yaml").read_text())["stages"]["copy1"]["meta"][
        "retries"
    ]
    for _ in range(MOST_LOSSES * (1 + retries)):
        _, engine = wait_for(lambda: stage_process(site.workers), pipeline)
        engine.kill()
        engine.wait(30)
    output, _ = pipeline.communicate(timeout=TIMEOUT_S)
    assert pipeline.returncode == 1, output
    assert output.strip().splitlines()[-1].startswith("error: copy1: lost with its worker")
    site.hang(on=False)
    site.ultraflux(site.pipeline, "run", "--engine", "pools", "--remote-data")
    site.ultraflux(site.single, "run")
    same_as_single(site)


@pytest.mark.parametrize(("cancelled", "seed"), [("pipeline", 81), ("stage", 82)])
def test_what_is_cancelled_in_the_ui_ends_on_the_other_machine_and_a_rerun_has_the_same_bytes(
    site: Site, cancelled: str, seed: int
) -> None:
    site.reseed(seed)
    site.hang(on=True)
    known = {run["id"] for run in site.flow_runs()}
    process = site.start()
    _, engine = wait_for(lambda: stage_process(site.workers), process)
    family = [engine, *engine.children(recursive=True)]
    (pipeline,) = [r for r in site.flow_runs(of_stages=False) if r["state"]["type"] == "RUNNING"]
    (stage,) = [r for r in site.flow_runs() if r["state"]["type"] == "RUNNING"]
    assert stage["name"] == "copy1"
    chosen = pipeline if cancelled == "pipeline" else stage
    # What the UI's "Cancel" sends.
    site.api(f"/flow_runs/{chosen['id']}/set_state", {"state": {"type": "CANCELLING"}})
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == (130 if cancelled == "pipeline" else 1), output
    said = "interrupted" if cancelled == "pipeline" else "copy1: cancelled in Prefect"
    assert said in output
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert stage_process(site.workers) is None
    assert site.state(chosen) == "Cancelled"
    deadline = time.monotonic() + 60
    while site.state(stage) != "Cancelled" and time.monotonic() < deadline:
        time.sleep(0.3)
    assert site.state(stage) == "Cancelled"
    # What had ended is in the lock, what was cancelled was not tried again.
    new = sorted(run["name"] for run in site.flow_runs() if run["id"] not in known)
    assert new == ["copy1", "ingest"]
    lock = yaml.safe_load((site.pipeline / "dvc.lock").read_text())["stages"]
    assert lock["ingest"]["params"]["params.yaml"]["project.seed"] == seed
    assert lock["copy1"]["params"]["params.yaml"]["project.seed"] != seed

    site.hang(on=False)
    known = {run["id"] for run in site.flow_runs()}
    site.ultraflux(site.pipeline, "run", "--engine", "pools", "--remote-data")
    again = sorted(run["name"] for run in site.flow_runs() if run["id"] not in known)
    assert again == ["copy1", "copy2"]
    site.ultraflux(site.single, "run")
    same_as_single(site)


def test_a_submitted_pipeline_that_is_cancelled_leaves_no_process_on_any_machine(
    site: Site,
) -> None:
    site.hang(on=True)
    asked = ("submit", "--remote-data", "-S", "project.seed=90")
    site.ultraflux(site.pipeline, *asked)

    def found() -> tuple[Path, psutil.Process] | None:
        return stage_process(site.workers)

    deadline = time.monotonic() + TIMEOUT_S
    while (running := found()) is None and time.monotonic() < deadline:
        time.sleep(0.3)
    assert running is not None, [run["state"] for run in site.flow_runs(of_stages=False)]
    family = [running[1], *running[1].children(recursive=True)]
    (pipeline,) = [r for r in site.flow_runs(of_stages=False) if r["state"]["type"] == "RUNNING"]
    site.api(f"/flow_runs/{pipeline['id']}/set_state", {"state": {"type": "CANCELLING"}})
    assert psutil.wait_procs(family, timeout=120)[1] == []
    assert found() is None
    deadline = time.monotonic() + 60
    while site.state(pipeline) != "Cancelled" and time.monotonic() < deadline:
        time.sleep(0.3)
    assert site.state(pipeline) == "Cancelled"
    site.hang(on=False)
    assert "Completed" in site.ultraflux(site.pipeline, *asked, "--watch")


def test_credentials_stay_in_the_environment(site: Site) -> None:
    secret = site.env.get("AWS_SECRET_ACCESS_KEY")
    if secret is None:
        pytest.skip("a folder needs none")
    clones = (site.pipeline, *site.workers, site.single)
    # Settings, records, logs, and the databases of Prefect and MLflow.
    files = [path for clone in clones for path in clone.rglob("*") if path.is_file()]
    told = [str(path) for path in files if secret.encode() in path.read_bytes()]
    assert told == []
    assert any(path.name == "prefect.db" for path in files)


def test_a_worker_whose_clone_was_edited_refuses_with_one_line(site: Site) -> None:
    site.reseed(79)
    for clone in site.workers:
        (clone / "source-edited").touch()
    done = site.attempt(site.pipeline, "run", "--engine", "pools", "--remote-data")
    assert done.returncode == 1
    assert "changes that no commit has" in done.stderr
    for clone in site.workers:
        (clone / "source-edited").unlink()


def test_a_worker_that_does_not_see_the_pipelines_clone_names_the_option(tmp_path: Path) -> None:
    from flows.pipeline.deployed import worker_clone

    with pytest.raises(FileNotFoundError, match="--remote-data") as caught:
        worker_clone(str(tmp_path / "absent"), {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--remote-data"], "--remote-data: give --engine pools with it"),
        (["deploy", "--limit", "1"], "--limit is for --workers"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(arguments: list[str], said: str) -> None:
    env = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run(["ultraflux", *arguments], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
