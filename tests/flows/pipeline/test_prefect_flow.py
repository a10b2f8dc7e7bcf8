"""The Prefect flow over a real DVC graph and a real embedded server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image

from flows.environment import project_name

SCRIPT = """
import json, sys
from pathlib import Path
from flows import environment
from flows.records.records import RunDescription, open_record
from flows.running.dvc_repro import DvcRunner
from flows.services.embedded_prefect import embedded_prefect
from flows.versioning import graph as versioning
environment.prepare(offline=True)
root = Path(sys.argv[1])
result = {}
with embedded_prefect(root) as env:
    from flows.pipeline.prefect_flow import build_flow
    from prefect import get_client
    for attempt in ("failing", "mended", "again"):
        if attempt == "mended":
            (root / "b.fail").unlink()
        graph = versioning.stage_graph(root)
        record = open_record(root, RunDescription(kind="pipeline", name="pipeline"))
        stale = versioning.stale_stages(root, graph)
        runner = DvcRunner(root, graph, parent_record=record.record_id, stale=stale)
        seen = []
        outcomes = build_flow(runner, lambda outcome: seen.append(outcome.name))()
        result[attempt] = {
            "outcomes": {name: outcome.status for name, outcome in outcomes.items()},
            "reported": sorted(seen),
            "message": outcomes["b"].message,
        }
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs()
        result["states"] = sorted((t.name, t.state.name, t.run_count) for t in tasks)
        result["flows"] = [
            [run.state.name, run.state.message, run.tags]
            for run in sorted(client.read_flow_runs(), key=lambda run: run.created)
        ]
        from prefect.states import Completed, Pending, Running
        from flows.pools.ended_flow_runs import close_killed_flow_runs
        from flows.records import owners
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
        def tasks_of(client, run):
            of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
            return client.read_task_runs(flow_run_filter=of_run)
        left = list((root / "runs" / "flow-runs").glob("*"))
        killed, alive, ended = (
            client.create_flow_run(build_flow.__globals__["flow"](lambda: None, name=name))
            for name in ("killed", "alive", "ended")
        )
        for run in (killed, alive, ended):
            client.set_flow_run_state(run.id, Running(), force=True)
            owners.own_flow_run(root, str(run.id))
            for state in (Running(), Pending(), Completed()):
                task = build_flow.__globals__["task"](lambda: None, name=state.name)
                made = client.create_task_run(task, run.id, dynamic_key=state.name)
                client.set_task_run_state(made.id, state, force=True)
        client.set_flow_run_state(ended.id, Completed(), force=True)
        owners.own_flow_run(root, "00000000-0000-0000-0000-000000000000")
        for path in (root / "runs" / "flow-runs").glob("*.json"):
            if path.stem != str(alive.id):
                values = json.loads(path.read_text())
                path.write_text(json.dumps(values | {"started": values["started"] - 5, "ticks": 1}))
        result["closed"] = [
            len(left),
            close_killed_flow_runs(root),
            [client.read_flow_run(run.id).state.name for run in (killed, alive, ended)],
            [sorted(task.state.name for task in tasks_of(client, run)) for run in (killed, alive)],
            [path.stem == str(alive.id) for path in (root / "runs" / "flow-runs").glob("*")],
        ]
        result["artifacts"] = [[a.key, a.type, a.data] for a in client.read_artifacts()]
print(json.dumps(result))
"""

SHOWN = """\
  generate:
    cmd: cp sheet.png data/generate/grid.png
    deps: [sheet.png]
    outs: [data/generate/grid.png]
    meta: {meta}
  evaluate:
    cmd: cp source data/evaluate/report.html
    deps: [source, data/generate/grid.png]
    outs: [data/evaluate/report.html]
    meta: {meta}
"""


@pytest.fixture
def with_pictures(toy: Path) -> Path:
    """The project with a stage that makes a picture, and one that makes a report."""
    graph = toy / "dvc.yaml"
    meta = yaml.safe_load(graph.read_text())["stages"]["a"]["meta"]
    graph.write_text(graph.read_text() + SHOWN.format(meta=json.dumps(meta)))
    Image.new("RGB", (3000, 1500), (200, 30, 30)).save(toy / "sheet.png")
    for stage in ("generate", "evaluate"):
        (toy / "data" / stage).mkdir()
    return toy


def test_the_flow_runs_retries_blocks_skips_and_shows_what_it_made(
    with_pictures: Path, root: Path
) -> None:
    toy = with_pictures
    (toy / "b.fail").touch()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(toy)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    failing = result["failing"]["outcomes"]
    assert failing["b"] == "failed"
    assert failing["c"] == "skipped"
    assert failing["d"] == "blocked"
    assert result["failing"]["reported"] == ["a", "b", "c", "d", "evaluate", "generate"]
    assert (toy / "b.runs").read_text().count("run") == 3
    assert set(result["mended"]["outcomes"].values()) == {"skipped"}
    assert set(result["again"]["outcomes"].values()) == {"skipped"}
    # A pipeline in a terminal that was killed is not running for ever; others are left alone.
    assert result["closed"] == [
        0,
        3,
        ["Crashed", "Running", "Completed"],
        [["Cancelled", "Completed", "Crashed"], ["Completed", "Pending", "Running"]],
        [True],
    ]
    # b in the failing flow ran twice: the first attempt and one retry.
    assert ["b", "Failed", 2] in result["states"]
    names = [name for name, _, _ in result["flows"]]
    assert names == ["Failed", "Completed", "Completed"]
    failed = result["flows"][0][1]
    assert failed.startswith("1 blocked, 1 failed, 4 skipped; b: ")
    # What automations know a run of this project by.
    assert all(tags == [project_name(toy)] for _, _, tags in result["flows"])
    assert (toy / "data" / "d").is_file()
    kinds = sorted((key or "", kind) for key, kind, _ in result["artifacts"])
    assert kinds == sorted(
        [("", "progress"), ("pictures", "image"), ("report", "markdown"), ("stages", "table")] * 3
    )
    (uri,) = {data for key, _, data in result["artifacts"] if key == "pictures"}
    with urllib.request.urlopen(uri) as answer, Image.open(io.BytesIO(answer.read())) as shown:
        assert (shown.format, shown.size) == ("JPEG", (1024, 512))


KILLED_SERVER = """
import json, os, signal, sys, threading, time
from pathlib import Path
import psutil
from flows import environment
from flows.records.records import RunDescription, open_record
from flows.running.dvc_repro import DvcRunner
from flows.services.embedded_prefect import embedded_prefect
from flows.versioning import graph as versioning
environment.prepare(offline=True)
root, kills_at = Path(sys.argv[1]), sys.argv[2]
with embedded_prefect(root):
    from flows.pipeline import prefect_flow
    graph = versioning.stage_graph(root)
    record = open_record(root, RunDescription(kind="pipeline", name="pipeline"))
    stale = versioning.stale_stages(root, graph)
    runner = DvcRunner(root, graph, parent_record=record.record_id, stale=stale)
    def kill():
        for process in psutil.Process().children(recursive=True):
            if "prefect" in " ".join(process.cmdline()):
                process.kill()
    def report(outcome):
        seen.append([outcome.name, time.monotonic()])
        if outcome.name == kills_at:
            kill()
    seen, said = [], []
    if kills_at == "start":
        kill()
    begun = time.monotonic()
    outcomes = prefect_flow.build_flow(runner, report, said.append)()
print(json.dumps({
    "outcomes": {name: outcome.status for name, outcome in outcomes.items()},
    "seen": [name for name, _ in seen],
    "said": said,
    "lost": prefect_flow.server_lost.is_set(),
    "longest_wait": max(b - a for a, b in zip([begun] + [at for _, at in seen],
                                              [at for _, at in seen] + [time.monotonic()])),
}), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills_at", ["start", "a", "d"])
def test_a_server_that_dies_costs_a_line_and_no_result(
    toy: Path, root: Path, kills_at: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SERVER, str(toy), kills_at],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    # What DVC runs without our recorder counts as restored.
    assert set(result["outcomes"].values()) == {"skipped"}
    assert sorted(result["seen"]) == ["a", "b", "c", "d"]
    assert result["lost"]
    (line,) = result["said"]
    assert "has gone: the pipeline goes on without it" in line
    # Each stage once, whoever walked the graph.
    assert (toy / "b.runs").read_text() == "run\n"
    assert (toy / "data" / "d").is_file()
    # It is 2 to 4 s on a quiet machine; Prefect's client would try for minutes.
    assert result["longest_wait"] < 60
