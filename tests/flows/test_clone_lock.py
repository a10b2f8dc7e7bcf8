"""One run at a time in a clone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from flows.clones.clone_lock import clone_lock
with clone_lock(Path(sys.argv[1]), lambda line: print(line, flush=True)):
    print("has it", flush=True)
    sys.stdin.read(1)
"""


def start(root: Path, clone: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(clone)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def test_a_second_run_waits_for_the_first_and_says_so(root: Path, tmp_path: Path) -> None:
    first = start(root, tmp_path)
    assert said(first) == "has it"
    second = start(root, tmp_path)
    assert said(second) == (
        f"Another run (process {first.pid}) works in {tmp_path}: waiting until it ends; "
        "Ctrl-C to leave"
    )
    first.kill()
    assert said(second) == "has it"
    second.communicate("x", timeout=60)
    assert second.returncode == 0
    first.communicate()
