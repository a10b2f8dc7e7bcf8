"""Run a command so that it dies with the process that asked for it.

This module, started as a program with `FD GRACE COMMAND...`, is the launcher: it leads a process
group of its own, runs COMMAND in it and watches the read end FD of a pipe whose write end only the
asking process holds. When that process ends, however it ends (kill -9 included), the pipe closes
and the whole group is stopped: SIGTERM, then SIGKILL. A parent-death signal would not do: it
follows the thread that forked, and it does not reach grandchildren such as the training process
under `dvc`.

Should the launcher itself be killed, the asking process ends what is left of its group, and without
an asking process the group ends itself: COMMAND by a parent-death signal (the launcher has one
thread), a stage below it by `end_with_launcher`. Otherwise a stage would work on beside the one
that the next run starts.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

GRACE_S = 5.0
LAUNCHER = "ULTRAFLUX_LAUNCHER"
"""Process id of the launcher, in the environment of what it runs."""
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05


class Launcher(Protocol):
    """A launcher that runs, however it was started; as `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None:
        """Exit code of its command, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: still running after `timeout` seconds.
        """


class LauncherForks(Protocol):
    """Forks launchers (`flows.running.warm_start`)."""

    def launch(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        output: int,
        pipe: int,
        held: Sequence[int],
        grace_s: float,
    ) -> Launcher | None:
        """A launcher for `command`; None: it has to be started."""


class GuardedProcess:
    """A command under the launcher."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | int | None = None,
        held: Sequence[int] = (),
        grace_s: float = GRACE_S,
        warm: LauncherForks | None = None,
    ) -> None:
        """Start `command`.

        Args:
            command: program and arguments.
            cwd: its folder.
            env: its environment (default: this one).
            output: where its standard output and error go (default: inherited).
            held: file descriptors (locks) that the launcher keeps open until the group is gone.
            grace_s: between SIGTERM and SIGKILL, for processes that save their state meanwhile.
            warm: has the imports of `command`, which is `dvc`, and forks the launcher.
        """
        self.cwd = cwd
        read_end, write_end = os.pipe()
        process: Launcher | None = None
        try:
            if warm is not None and env is not None and output is not None:
                process = warm.launch(
                    command,
                    cwd=cwd,
                    env=env,
                    output=output if isinstance(output, int) else output.fileno(),
                    pipe=read_end,
                    held=held,
                    grace_s=grace_s,
                )
            self._process = process or self._started(
                command, cwd, env, output, (read_end, *held), grace_s
            )
        finally:
            # Held here it would keep the pipe's reading side open; only the launcher watches it.
            os.close(read_end)
        self._write_end: int | None = write_end

    @staticmethod
    def _started(
        command: Sequence[str],
        cwd: Path,
        env: Mapping[str, str] | None,
        output: IO[bytes] | int | None,
        passed: tuple[int, ...],
        grace_s: float,
    ) -> subprocess.Popen[bytes]:
        """The launcher as a new program; `passed` begins with the pipe's read end."""
        return subprocess.Popen(
            # By its path: the command's folder may be a clone with other code, or none.
            [sys.executable, str(Path(__file__).resolve()), str(passed[0]), str(grace_s), *command],
            cwd=cwd,
            env=dict(env) if env is not None else None,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            pass_fds=passed,
            # Out of the terminal's group: Ctrl-C reaches the asking process alone, which then
            # stops its stages in order.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Process id of the launcher, which is also the process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code of the command, None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the command and return its exit code.

        Raises:
            subprocess.TimeoutExpired: still running after `timeout_s`.
        """
        code = self._process.wait(timeout_s)
        self._close()
        self._end_orphans(code)
        return code

    def stop(self) -> int:
        """Stop the whole group and return the exit code."""
        self._close()
        code = self._process.wait()
        self._end_orphans(code)
        return code

    def _end_orphans(self, code: int) -> None:
        """Kill the group of a launcher that was killed (it ends by itself with a code of 0 up)."""
        if code < 0:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _close(self) -> None:
        if self._write_end is not None:
            os.close(self._write_end)
            self._write_end = None


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux)."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_launcher() -> None:
    """Kill this process's group when its launcher is killed; nothing without a launcher."""
    pid = os.environ.get(LAUNCHER, "")
    # In another group (a terminal's, a rank's) this process is not the launcher's to end.
    if not pid.isdigit() or os.getpgrp() != int(pid):
        return
    try:
        launcher = os.pidfd_open(int(pid))
    except ProcessLookupError:
        os.killpg(0, signal.SIGKILL)
        return

    def watch() -> None:
        poller = select.poll()
        poller.register(launcher, select.POLLIN)
        poller.poll()
        # A launcher that ends in order has seen to its group before.
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-launcher").start()


class Forked:
    """A forked child, asked as `subprocess.Popen` is."""

    def __init__(self, pid: int) -> None:
        """The child `pid` of this process."""
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class Stages(Protocol):
    """Children of a launcher beside its command."""

    def fds(self) -> list[int]:
        """Descriptors that say something for `handle`."""

    def handle(self, fd: int) -> None:
        """See to what came in."""

    def answer(self) -> None:
        """See to those that have ended."""


def guard(
    pipe: int, grace_s: float, command: Forked | subprocess.Popen[bytes], stages: Stages | None
) -> int:
    """Watch over a launcher's command until it ends; its exit code as a shell says it.

    Args:
        pipe: read end of the pipe of the asking process; when it closes, the group is stopped.
        grace_s: between SIGTERM and SIGKILL.
        command: the launcher's child.
        stages: children beside it; None: there cannot be any.
    """
    # So that one poll waits for all: the command's end, the asking process's, and what stages say.
    command_fd = os.pidfd_open(command.pid)
    try:
        while command.poll() is None:
            others = [] if stages is None else stages.fds()
            poller = select.poll()
            for fd in (pipe, command_fd, *others):
                poller.register(fd, select.POLLIN | select.POLLHUP)
            ready = [fd for fd, _ in poller.poll()]
            if pipe in ready:
                _stop_group(command, grace_s, stages)
            if stages is not None:
                stages.answer()
                # Of those that have not ended just now.
                for fd in set(ready) & set(stages.fds()):
                    stages.handle(fd)
    finally:
        # In a child that is forked here, too.
        os.close(command_fd)
    code = command.returncode
    assert code is not None
    return code if code >= 0 else 128 - code


def _stop_group(
    child: Forked | subprocess.Popen[bytes], grace_s: float, stages: Stages | None
) -> None:
    """SIGTERM everybody in this group but the launcher, then SIGKILL what is left.

    `dvc`, the child, ends at once; the stage below it may be saving its state.
    """
    # The launcher is in the group that it signals, and has to live to send SIGKILL.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        if stages is not None:
            stages.answer()
        # The child has to be reaped as well: DVC takes the process of a lock for alive while its
        # entry is there.
        if child.poll() is not None and not _others():
            break
        time.sleep(_POLL_S)
    os.killpg(0, signal.SIGKILL)


def _others() -> bool:
    """Whether any process of this group but this one is left, dead ones not counted.

    By /proc: this program starts with each stage and imports nothing that takes long.
    """
    group, own = os.getpgrp(), os.getpid()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            # The name in parentheses may hold anything, also spaces.
            fields = (
                Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()
            )
        except OSError:
            continue
        if int(fields[2]) == group and int(name) != own and fields[0] not in "ZX":
            return True
    return False


def main(arguments: Sequence[str]) -> int:
    """Entry point of the launcher process."""
    pipe, grace_s, command = int(arguments[0]), float(arguments[1]), list(arguments[2:])
    # An asking process that ignores SIGINT must not hand that on to training processes.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ[LAUNCHER] = str(os.getpid())
    # The command gets neither the pipe nor the locks: a grandchild that stays behind would keep
    # them.
    return guard(
        pipe, grace_s, subprocess.Popen(command, close_fds=True, preexec_fn=die_with_parent), None
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
