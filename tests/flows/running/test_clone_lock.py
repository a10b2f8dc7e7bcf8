"""One run at a time in a clone."""

from __future__ import annotations

import select
import subprocess
import sys
from pathlib import Path

import psutil

from flows.running.clone_lock import stage_lock

HOLD = """
import sys
from pathlib import Path
from flows.running.clone_lock import clone_lock
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


STAGE = """
import os, sys
from pathlib import Path
from flows.running.clone_lock import stage_lock
from flows.running.guarded_process import GuardedProcess
with stage_lock(Path(sys.argv[1]), "vae", lambda: False) as lock:
    print("has it", flush=True)
    quiet = os.open(os.devnull, os.O_WRONLY)
    child = GuardedProcess(["sleep", "600"], cwd=Path(sys.argv[1]), output=quiet, held=(lock,))
    print(child.pid, flush=True)
    sys.stdin.read(1)
"""


def test_a_stage_begins_when_the_last_process_of_its_former_run_is_gone(
    root: Path, tmp_path: Path
) -> None:
    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", STAGE, str(tmp_path)],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    first = begin()
    assert said(first) == "has it"
    launcher = psutil.Process(int(said(first)))
    launcher.suspend()
    first.kill()
    first.communicate()
    second = begin()
    assert select.select([second.stdout], [], [], 3)[0] == []
    launcher.resume()
    assert said(second) == "has it"
    assert psutil.wait_procs([launcher], timeout=60)[1] == []
    second.communicate("x", timeout=60)
    assert second.returncode == 0


def test_a_wait_for_a_stage_ends_when_the_run_is_stopped(root: Path, tmp_path: Path) -> None:
    with stage_lock(tmp_path, "vae", lambda: False), stage_lock(tmp_path, "dit", lambda: False):
        asked = iter([False, False, True])
        with stage_lock(tmp_path, "vae", lambda: next(asked)):
            assert list(asked) == []
