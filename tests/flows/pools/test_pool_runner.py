"""Stages on pools while nobody answers at the Prefect server's address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from flows.services import servers as services

# In a process of its own: Prefect reads the address of its server once, for all threads.
WAITING = """
import json, sys, threading, time
from pathlib import Path
from flows.pools import pool_runner
from flows.versioning.graph import stage_graph
root = Path(sys.argv[1])
graph = stage_graph(root)

def waits(away_s, stop_after_s):
    pool_runner.SERVER_AWAY_S = away_s
    runner = pool_runner.PoolRunner(root, graph, parent_record="run", stale={"a": "new"})
    if stop_after_s:
        threading.Timer(stop_after_s, runner.stop).start()
    began = time.monotonic()
    outcome = runner.run("a")
    return [time.monotonic() - began, outcome.status, outcome.message]

print(json.dumps([waits(0.5, None), waits(900.0, 2.5)]))
"""


def test_a_server_that_stays_away_costs_one_line_and_a_stop_ends_the_wait(
    toy: Path, root: Path
) -> None:
    url = f"http://127.0.0.1:{services.free_port()}/api"
    done = subprocess.run(
        [sys.executable, "-c", WAITING, str(toy)],
        env=os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(toy / "prefect")},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    given_up, stopped = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 <= given_up[0] < 60
    assert given_up[1] == "failed"
    assert given_up[2].startswith("a: the Prefect server does not answer (")
    assert "\n" not in given_up[2]
    assert 2.5 <= stopped[0] < 60
    assert stopped[1:] == ["failed", "a: interrupted"]
