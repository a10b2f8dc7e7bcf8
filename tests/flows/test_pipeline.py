"""The Prefect flow over a real DVC graph and a real embedded server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from flows import environment, services, versioning
from flows.history.records import RunDescription, open_record
from flows.runner import StageRunner
environment.prepare(offline=True)
root = Path(sys.argv[1])
result = {}
with services.embedded_prefect(root) as env:
    from flows.pipeline import build_flow
    from prefect import get_client
    for attempt in ("failing", "mended", "again"):
        if attempt == "mended":
            (root / "b.fail").unlink()
        graph = versioning.stage_graph(root)
        record = open_record(root, RunDescription(kind="pipeline", name="pipeline"))
        stale = versioning.stale_stages(root, graph)
        runner = StageRunner(root, graph, parent_record=record.record_id, stale=stale)
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
        result["flows"] = [run.state.name for run in client.read_flow_runs()]
print(json.dumps(result))
"""


def test_the_flow_runs_retries_blocks_and_skips_like_the_local_scheduler(
    toy: Path, root: Path
) -> None:
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
    assert result["failing"]["reported"] == ["a", "b", "c", "d"]
    assert (toy / "b.runs").read_text().count("run") == 3
    assert set(result["mended"]["outcomes"].values()) == {"skipped"}
    assert set(result["again"]["outcomes"].values()) == {"skipped"}
    # b in the failing flow ran twice: the first attempt and one retry.
    assert ["b", "Failed", 2] in result["states"]
    assert len(result["flows"]) == 3
    assert (toy / "data" / "d").is_file()
