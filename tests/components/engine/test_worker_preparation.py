from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[3]

WORK = """
import os
from components.engine.worker_pool import EngineLimits, WorkerPool

prepared = []


def look(name):
    return [os.environ.get(name), len(prepared), os.getpid()]


look.prepare_worker = lambda: prepared.append(1)

if __name__ == "__main__":
    import json
    import work
    limits = EngineLimits(workers=1, timeout_s=20, memory_mb=512, retries=0)
    names = ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"]
    rows = list(WorkerPool(work.look, limits).map(names))
    print(json.dumps([rows, [os.environ.get(name) for name in names]]))
"""


def test_a_worker_keeps_its_memory_and_is_prepared_once_and_the_parent_is_as_before(
    tmp_path: Path,
) -> None:
    (tmp_path / "work.py").write_text(textwrap.dedent(WORK))
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    # What the user has chosen stays.
    environment |= {"PYTHONPATH": f"{ROOT}:{tmp_path}", "MALLOC_TOP_PAD_": "4096"}
    answer = subprocess.run(
        [sys.executable, "work.py"], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    rows, parent = json.loads(answer.stdout)
    assert [row[:2] for row in rows] == [[str(2**30), 1], ["4096", 1]]
    assert rows[0][2] == rows[1][2]
    assert parent == [None, "4096"]
