"""Deployments on a real Prefect server with real workers, in a project of trivial stages."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest
import yaml

pytestmark = pytest.mark.slow
TIMEOUT_S = 300


@dataclass
class Hook:
    """A local HTTP server that keeps what is posted to it."""

    url: str
    received: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def hook() -> Iterator[Hook]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.received.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept = Hook(f"http://127.0.0.1:{server.server_port}/failures")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kept
    server.shutdown()


@pytest.fixture(scope="module")
def site(pool_site: Callable[[dict[str, str]], Any], hook: Hook) -> Any:
    return pool_site({"ULTRAFLUX_FAILURE_WEBHOOK": hook.url})


HANGS = "import os, time\n(lambda: None if os.path.exists('go') else time.sleep(120))()\n"


def test_deploying_again_changes_nothing(site: Any) -> None:
    first = {d["id"]: d["updated"] for d in site.api("/deployments/filter", {})}
    said = site.ultraflux("deploy", "--workers")
    assert said.count(": unchanged") == 6
    again = site.api("/deployments/filter", {})
    assert {d["id"] for d in again} == set(first)
    assert all(d["schedules"] == [] for d in again)
    assert len(site.api("/automations/filter", {})) == 6
    assert len(site.api("/work_pools/filter", {})) == 3
    assert all(p["status"] == "READY" for p in site.api("/work_pools/filter", {}))


def test_a_pipeline_runs_on_pools_survives_a_killed_stage_and_shows_its_parts(site: Any) -> None:
    code = site.root / "flows" / "stages" / "copy1.py"
    kept = code.read_text()
    code.write_text(kept.replace("import shutil\n", "import shutil\n" + HANGS))
    process = subprocess.Popen(
        ["ultraflux", "run", "--engine", "pools"],
        cwd=site.root,
        env=site.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    engine = site.wait_for(lambda: site.stage_engine("copy1"), "running stage")
    (site.root / "go").touch()
    children = engine.children(recursive=True)
    engine.kill()
    output, _ = process.communicate(timeout=TIMEOUT_S)
    code.write_text(kept)
    assert process.returncode == 0, output
    assert output.count("done") == 3
    # The launcher took the killed run's processes with it.
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
    lock = yaml.safe_load((site.root / "dvc.lock").read_text())
    assert set(lock["stages"]) == {"ingest", "copy1", "copy2"}
    assert (site.root / "data/copy2/out").read_bytes() == (
        site.root / "data/sample/README.md"
    ).read_bytes()
    runs = site.api("/flow_runs/filter", {})
    stages = sorted((r["name"], r["state"]["name"]) for r in runs if "stage" in r["tags"])
    assert ("copy1", "Crashed") in stages
    assert ("copy1", "Completed") in stages
    assert all(run["parent_task_run_id"] for run in runs if "stage" in run["tags"])
    artifacts = site.api("/artifacts/filter", {})
    kinds = [(a["type"], a["key"]) for a in artifacts]
    assert ("table", "stages") in kinds
    assert [a["data"] for a in artifacts if a["type"] == "progress"] == [100.0]


@pytest.mark.parametrize("cancelled", ["pipeline", "stage"])
def test_a_run_cancelled_from_the_ui_leaves_no_process_and_the_next_one_finishes(
    site: Any, cancelled: str
) -> None:
    (site.root / "go").unlink(missing_ok=True)
    code = site.root / "flows" / "stages" / "copy1.py"
    kept = code.read_text()
    code.write_text(kept.replace("import shutil\n", f"import shutil\n# {cancelled}\n" + HANGS))
    site.ultraflux("submit")
    engine = site.wait_for(lambda: site.stage_engine("copy1"), "running stage")
    processes = [engine, *engine.children(recursive=True)]
    going = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    (pipeline,) = [r for r in site.api("/flow_runs/filter", going) if "stage" not in r["tags"]]
    (stage,) = [r for r in site.api("/flow_runs/filter", going) if "stage" in r["tags"]]
    chosen = pipeline if cancelled == "pipeline" else stage
    # What the UI's "Cancel" sends.
    site.api(f"/flow_runs/{chosen['id']}/set_state", {"state": {"type": "CANCELLING"}})

    def state_of(run: dict[str, Any]) -> str:
        return str(site.api(f"/flow_runs/{run['id']}")["state"]["type"])

    final = {"CANCELLED", "FAILED", "CRASHED", "COMPLETED"}
    site.wait_for(lambda: state_of(pipeline) in final, "end of the pipeline run")
    site.wait_for(lambda: state_of(stage) in final, "end of the stage run")
    assert state_of(chosen) == "CANCELLED"
    assert state_of(pipeline) != "COMPLETED"
    _, left = psutil.wait_procs(processes, timeout=60)
    assert left == []
    assert site.stage_engine("copy1") is None
    (site.root / "go").touch()
    watched = site.ultraflux("submit", "--watch")
    assert watched.splitlines()[-1].startswith("Completed")
    for stage in ("ingest", "copy1", "copy2"):
        assert re.search(rf"^  {stage} +(Completed|Skipped): ", watched, re.MULTILINE), watched
    code.write_text(kept)


def test_settings_given_to_a_submitted_run_apply_in_a_tree_of_its_own(site: Any) -> None:
    before = (site.root / "params.yaml").read_text()
    elsewhere = site.root.parent
    said = site.ultraflux("submit", "--watch", "-S", "project.seed=77", cwd=elsewhere)
    assert "Completed: 3 ran" in said
    (tree,) = (site.root / "runs" / "submitted").iterdir()
    assert yaml.safe_load((tree / "params.yaml").read_text())["project"]["seed"] == 77
    assert (tree / "data/copy2/out").is_file()
    assert (site.root / "params.yaml").read_text() == before
    again = site.ultraflux("submit", "--watch", "-S", "project.seed=77", cwd=elsewhere)
    assert "Completed: 3 skipped" in again


def test_one_stage_is_submitted_to_the_pool_of_dvc_yaml(site: Any) -> None:
    said = site.ultraflux("submit", "--stage", "copy2", "--watch")
    assert re.search(r"to pool ultraflux-[0-9a-f]{8}-cpu", said)
    assert "Skipped" in said or "Completed" in said


def test_a_failing_run_calls_the_web_hook_and_fails_the_command(site: Any, hook: Hook) -> None:
    done = site.attempt("submit", "--stage", "absent", "--pool", "gpu", "--watch")
    assert done.returncode == 1
    assert "no stage 'absent'" in done.stdout

    def told() -> list[dict[str, Any]]:
        return [post for post in hook.received if post["flow_run"] == "absent"]

    site.wait_for(told, "web hook call")
    time.sleep(3)
    # On SQLite Prefect may hand one event to an automation again (docs/clusters.md).
    post, *again = told()
    assert all(other == post for other in again)
    assert post["state"] == "Refused"
    assert "no stage 'absent'" in post["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-S", "vae.stepz=3"], "vae.stepz: unknown setting"),
        (["-S", "vae.steps=many"], "vae.steps = 'many'"),
        (["--stage", "nothing"], "no stage 'nothing'"),
        (["--profile", "nothing"], "profile 'nothing': not found"),
        (["--stage", "ingest", "--pool", "nothing"], "--pool nothing: choose cpu or gpu"),
        (["--stage", "ingest", "--profile", "paper"], "--profile is for the pipeline"),
    ],
)
def test_a_wrong_submission_is_one_line(site: Any, arguments: list[str], said: str) -> None:
    done = site.attempt("submit", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
