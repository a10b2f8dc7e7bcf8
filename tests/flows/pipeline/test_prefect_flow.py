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

SCRIPT = """
import json, sys
from pathlib import Path
from flows import environment
from flows.records.records import RunDescription, open_record
from flows.running.dvc_repro import DvcRunner
from flows.services import servers as services
from flows.versioning import graph as versioning
environment.prepare(offline=True)
root = Path(sys.argv[1])
result = {}
with services.embedded_prefect(root) as env:
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
        result["flows"] = [run.state.name for run in client.read_flow_runs()]
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
    # b in the failing flow ran twice: the first attempt and one retry.
    assert ["b", "Failed", 2] in result["states"]
    assert len(result["flows"]) == 3
    assert (toy / "data" / "d").is_file()
    kinds = sorted((key or "", kind) for key, kind, _ in result["artifacts"])
    assert kinds == sorted(
        [("", "progress"), ("pictures", "image"), ("report", "markdown"), ("stages", "table")] * 3
    )
    (uri,) = {data for key, _, data in result["artifacts"] if key == "pictures"}
    with urllib.request.urlopen(uri) as answer, Image.open(io.BytesIO(answer.read())) as shown:
        assert (shown.format, shown.size) == ("JPEG", (1024, 512))
