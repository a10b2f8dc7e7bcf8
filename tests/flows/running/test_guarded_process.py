"""Whoever is killed of asking process, launcher and command: nothing below works on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.running.guarded_process import GuardedProcess

# As `dvc` does with a stage: the command starts a shell, which starts what works.
STAGE = """\
import sys, time
from pathlib import Path
from flows.running.guarded_process import end_with_launcher
end_with_launcher()
Path(sys.argv[1]).write_text("x")
time.sleep(600)
"""
COMMAND = """\
import subprocess, sys
subprocess.run(["/bin/sh", "-c", f"{sys.executable} {sys.argv[1]} {sys.argv[2]}; true"])
"""
ASKING = """\
import sys
from pathlib import Path
from flows.running.guarded_process import GuardedProcess
folder = Path(sys.argv[1])
command = [sys.executable, str(folder / "command.py"), str(folder / "stage.py"), sys.argv[2]]
print(GuardedProcess(command, cwd=folder, grace_s=1.0).wait(), flush=True)
import time
time.sleep(600)
"""


@pytest.fixture
def asking(tmp_path: Path, root: Path) -> Iterator[Callable[[], psutil.Process]]:
    """Starts a process that has a command with a stage below it at work."""
    for name, text in (("stage", STAGE), ("command", COMMAND), ("asking", ASKING)):
        (tmp_path / f"{name}.py").write_text(text)
    at_work = tmp_path / "at-work"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "asking.py"), str(tmp_path), str(at_work)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
    )

    def start() -> psutil.Process:
        deadline = time.monotonic() + 120
        while not at_work.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return psutil.Process(process.pid)

    yield start
    for one in (
        psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    ):
        one.kill()
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", 143), ("kill -9 $$", 137)]
)
def test_the_exit_code_is_the_commands_as_a_shell_says_it(
    tmp_path: Path, script: str, code: int
) -> None:
    assert GuardedProcess(["/bin/sh", "-c", script], cwd=tmp_path).wait(60) == code


@pytest.mark.parametrize(
    "killed",
    [
        ("launcher",),
        pytest.param(("command",), marks=pytest.mark.slow),
        ("asking", "launcher"),
        pytest.param(("asking",), marks=pytest.mark.slow),
    ],
)
def test_nothing_works_on_when_one_of_them_is_killed(
    asking: Callable[[], psutil.Process], killed: tuple[str, ...]
) -> None:
    top = asking()
    launcher, *below = top.children(recursive=True)
    assert "guarded_process.py" in " ".join(launcher.cmdline())
    # The command, its shell and the stage.
    assert len(below) == 3
    for name in killed:
        {"asking": top, "launcher": launcher, "command": below[0]}[name].kill()
    if killed == ("command",):
        # The launcher ends with its command and leaves the rest to nobody: the stage notices.
        below = below[2:]
    _, alive = psutil.wait_procs(below, timeout=30)
    assert alive == []
