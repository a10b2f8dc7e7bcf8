"""On a server that others use, too, nothing of theirs is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Longer than the 90 s of silence after which our own runs count as lost, and with Prefect's own
# interval of heartbeats, which is twice that.
THEIRS = """\
import sys, time
from prefect import flow

@flow(name="another-teams-training")
def training(seconds: int = 160):
    with open(sys.argv[1] if len(sys.argv) > 1 else PLACE, "a") as file:
        file.write("start\\n")
    time.sleep(seconds)
    with open(sys.argv[1] if len(sys.argv) > 1 else PLACE, "a") as file:
        file.write("end\\n")

if __name__ == "__main__":
    training()
"""


@pytest.fixture(scope="module")
def shared(pool_site: Callable[[dict[str, str]], Any]) -> Any:
    """A server with our pools, deployments, automations and workers."""
    return pool_site({})


@pytest.fixture
def their_environment(shared: Any) -> dict[str, str]:
    """Of somebody who knows the server and nothing of us."""
    own = ("PREFECT_", "ULTRAFLUX_", "MLFLOW_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")
    return (
        env | {name: shared.env[name] for name in names} | {"PREFECT_SERVER_ANALYTICS_ENABLED": "0"}
    )


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.terminate()
        process.wait()


def prefect(folder: Path, env: dict[str, str], *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_foreign_flow_and_a_foreign_deployment_are_left_alone(
    shared: Any,
    their_environment: dict[str, str],
    started: list[subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    env = their_environment
    by_hand, deployed = tmp_path / "by-hand", tmp_path / "deployed"
    text = f"PLACE = {str(deployed)!r}\n{THEIRS}"
    (tmp_path / "theirs.py").write_text(text)
    prefect(tmp_path, env, "work-pool", "create", "theirs", "--type", "process")
    worker = ["worker", "start", "--pool", "theirs", "--name", "their-worker"]
    started.append(
        subprocess.Popen(
            [sys.executable, "-m", "prefect", "--no-prompt", *worker], cwd=tmp_path, env=env
        )
    )
    started.append(
        subprocess.Popen([sys.executable, "theirs.py", str(by_hand)], cwd=tmp_path, env=env)
    )
    code = (
        "from prefect import flow\n"
        f"flow.from_source(source={str(tmp_path)!r}, entrypoint='theirs.py:training')"
        ".deploy(name='theirs', work_pool_name='theirs', ignore_warnings=True)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=300)
    prefect(tmp_path, env, "deployment", "run", "another-teams-training/theirs")

    def ended() -> list[dict[str, Any]]:
        body = {"flows": {"name": {"any_": ["another-teams-training"]}}}
        runs: list[dict[str, Any]] = shared.api("/flow_runs/filter", body)
        done = [run for run in runs if run["state_type"] in {"COMPLETED", "FAILED", "CRASHED"}]
        return done if len(done) == len(runs) == 2 else []

    runs = shared.wait_for(ended, "end of both foreign runs")
    allowed = {"Scheduled", "Pending", "Running", "Completed"}
    for run in runs:
        assert set(shared.states(run["id"])) <= allowed
        assert run["run_count"] == 1
        assert run["state_name"] == "Completed"
    for place in (by_hand, deployed):
        assert place.read_text() == "start\nend\n"
    # Ours are there and at work: the server has automations, and they are on.
    automations = shared.api("/automations/filter", {})
    assert sum(one["enabled"] for one in automations) >= 3
