"""Flow runs whose machine is gone, with a real Prefect server and its automations.

The times are production's: heartbeats every 30 s, 90 s without one.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import yaml

pytestmark = pytest.mark.slow
TIMEOUT_S = 300
# The stage says that it has begun, and goes on when a file is there.
WAITS = """import os, time
with open("runs/copy1.begun", "a") as begun:
    begun.write("{name}\\n")
for _ in range(3000):
    if os.path.exists("go"):
        break
    time.sleep(0.2)
"""
LOST_AND_FOUND = [
    *("Scheduled", "Pending", "Running", "HeartbeatLost"),
    *("AwaitingRetry", "Pending", "Running", "Completed"),
]


@pytest.fixture(scope="module")
def site(pool_site: Callable[[dict[str, str]], Any]) -> Any:
    return pool_site({})


@pytest.fixture
def waiting(site: Any, request: pytest.FixtureRequest) -> Any:
    """The site, with a stage copy1 that has to run and waits for `go`."""
    (site.root / "go").unlink(missing_ok=True)
    (site.root / "runs" / "copy1.begun").unlink(missing_ok=True)
    code = site.root / "flows" / "stages" / "copy1.py"
    kept = code.read_text()
    waits = WAITS.format(name=request.node.name)
    code.write_text(kept.replace("import shutil\n", f"import shutil\n{waits}"))
    yield site
    (site.root / "go").touch()
    code.write_text(kept)
    # Whatever a test killed.
    site.ultraflux("deploy", "--workers")


def begun(site: Any) -> int:
    """How often copy1 has begun."""
    path = site.root / "runs" / "copy1.begun"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def engine_of_a_stage_that_has_begun(site: Any) -> psutil.Process:
    """The flow run process above copy1, which waits."""
    site.wait_for(lambda: begun(site) == 1, "stage that has begun")
    engine: psutil.Process = site.stage_engine("copy1")
    return engine


def outputs_are_there(site: Any) -> None:
    source = site.root / "data" / "sample" / "README.md"
    for stage in ("ingest", "copy1", "copy2"):
        assert (site.root / "data" / stage / "out").read_bytes() == source.read_bytes()
    status = ["dvc", "status", "-q"]
    assert subprocess.run(status, cwd=site.root, env=site.env).returncode == 0


def running(site: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's and the stage's flow run."""
    going = site.runs(type=["RUNNING"])
    (pipeline,) = [run for run in going if "stage" not in run["tags"]]
    (stage,) = [run for run in going if "stage" in run["tags"]]
    return pipeline, stage


def kill_machine(site: Any) -> None:
    """SIGKILL to all workers and their flow runs at once."""
    family = [
        process
        for worker in site.workers().values()
        for process in (worker, *worker.children(recursive=True))
    ]
    for process in family:
        process.kill()
    assert psutil.wait_procs(family, timeout=60)[1] == []


def test_a_run_that_was_claimed_and_never_begun_is_scheduled_again(site: Any) -> None:
    path = site.root / "conf" / "automations" / "pending_lost.yaml"
    kept = path.read_text()
    path.write_text(kept.replace("within: 900", "within: 15"))
    assert yaml.safe_load(path.read_text())["trigger"]["within"] == 15
    site.workers()["cpu"].kill()
    assert site.ultraflux("deploy").count(": updated") == 1
    site.ultraflux("submit", "--stage", "ingest")
    (run,) = site.runs(type=["SCHEDULED"])
    # A worker's first word about a run that it takes.
    claim = {"state": {"type": "PENDING", "name": "Pending"}}
    site.api(f"/flow_runs/{run['id']}/set_state", claim)
    site.ultraflux("deploy", "--workers")
    end = ["Pending", "Running", "Completed"]
    site.wait_for(lambda: site.states(run["id"])[-3:] == end, "end of the run")
    assert site.states(run["id"]) == [*LOST_AND_FOUND[:2], "HeartbeatLost", "AwaitingRetry", *end]
    path.write_text(kept)
    site.ultraflux("deploy")


def test_a_stage_whose_machine_is_gone_runs_again_and_its_pipeline_is_not_taken_for_lost(
    waiting: Any,
) -> None:
    # In a terminal: no work pool gives this process an environment.
    process = subprocess.Popen(
        ["ultraflux", "run", "--engine", "pools"],
        cwd=waiting.root,
        env=waiting.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    engine = engine_of_a_stage_that_has_begun(waiting)
    pipeline, stage = running(waiting)
    family = [engine, *engine.children(recursive=True)]
    waiting.workers()["cpu"].kill()
    engine.kill()
    assert psutil.wait_procs(family, timeout=60)[1] == []
    (waiting.root / "go").touch()
    waiting.ultraflux("deploy", "--workers")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert waiting.states(stage["id"]) == LOST_AND_FOUND
    assert waiting.states(pipeline["id"])[-2:] == ["Running", "Completed"]
    assert begun(waiting) == 2
    outputs_are_there(waiting)


def test_a_machine_with_pipeline_and_stage_that_is_gone_costs_no_result(waiting: Any) -> None:
    waiting.ultraflux("submit")
    engine_of_a_stage_that_has_begun(waiting)
    pipeline, stage = running(waiting)
    kill_machine(waiting)
    (waiting.root / "go").touch()
    waiting.ultraflux("deploy", "--workers")
    waiting.wait_for(
        lambda: waiting.states(pipeline["id"])[-1] in {"Completed", "Failed", "Crashed"},
        "end of the pipeline",
    )
    assert waiting.states(pipeline["id"]) == LOST_AND_FOUND
    assert waiting.states(stage["id"]) == LOST_AND_FOUND
    again = [run for run in waiting.runs() if run["name"] == "copy1"]
    assert max(run["expected_start_time"] for run in again) == stage["expected_start_time"]
    assert begun(waiting) == 2
    outputs_are_there(waiting)


def test_a_run_that_was_only_silent_ends_once_and_its_second_attempt_waits(waiting: Any) -> None:
    waiting.ultraflux("submit")
    engine = engine_of_a_stage_that_has_begun(waiting)
    pipeline, stage = running(waiting)
    engine.suspend()
    try:
        waiting.wait_for(
            lambda: waiting.states(stage["id"]).count("Running") == 2, "second attempt"
        )
        # Long enough for a stage to begin, were nothing in its way.
        time.sleep(10)
        assert begun(waiting) == 1
        (waiting.root / "go").touch()
        waiting.wait_for(
            lambda: waiting.states(pipeline["id"])[-1] in {"Completed", "Failed", "Crashed"},
            "end of the pipeline",
        )
        # The second attempt found the stage done.
        assert waiting.states(stage["id"]) == [*LOST_AND_FOUND[:-1], "Skipped"]
    finally:
        engine.resume()
    assert waiting.states(pipeline["id"])[-1] == "Completed"
    assert begun(waiting) == 1
    psutil.wait_procs([engine], timeout=60)
    # What the first attempt says late is the same.
    assert waiting.states(stage["id"])[-1] in {"Skipped", "Completed"}
    outputs_are_there(waiting)


def test_runs_cancelled_after_their_machine_is_gone_do_not_stay_cancelling(waiting: Any) -> None:
    waiting.ultraflux("submit")
    engine_of_a_stage_that_has_begun(waiting)
    pipeline, stage = running(waiting)
    kill_machine(waiting)
    # What the UI's "Cancel" sends.
    waiting.api(f"/flow_runs/{pipeline['id']}/set_state", {"state": {"type": "CANCELLING"}})
    for run in (pipeline, stage):
        waiting.wait_for(
            lambda run=run: waiting.states(run["id"])[-1] == "Cancelled", "cancelled run"
        )
    assert "HeartbeatLost" not in waiting.states(pipeline["id"])
    (waiting.root / "go").touch()
    waiting.ultraflux("deploy", "--workers")
    assert "Completed" in waiting.ultraflux("submit", "--watch")
    outputs_are_there(waiting)
