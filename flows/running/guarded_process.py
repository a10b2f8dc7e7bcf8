"""Run a command so that it dies with the process that asked for it.

This module, started as a program with `FD COMMAND...`, is the launcher: it leads a process group of
its own, runs COMMAND in it and watches the read end FD of a pipe whose write end only the asking
process holds. When that process ends, however it ends (kill -9 included), the pipe closes and the
whole group is stopped: SIGTERM, then SIGKILL. A parent-death signal would not do: it follows the
thread that forked, and it does not reach grandchildren such as the training process under `dvc`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

GRACE_S = 5.0


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
    ) -> None:
        """Start `command`.

        Args:
            command: program and arguments.
            cwd: its folder.
            env: its environment (default: this one).
            output: where its standard output and error go (default: inherited).
            held: file descriptors (locks) that the launcher keeps open until the group is gone.
        """
        self.cwd = cwd
        read_end, write_end = os.pipe()
        os.set_inheritable(read_end, True)
        # By its path: the command's folder may be a clone with other code, or none.
        launcher = Path(__file__).resolve()
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(launcher), str(read_end), *command],
                cwd=cwd,
                env=dict(env) if env is not None else None,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                pass_fds=(read_end, *held),
                start_new_session=True,
            )
        finally:
            os.close(read_end)
        self._write_end: int | None = write_end

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
        return code

    def stop(self) -> int:
        """Stop the whole group and return the exit code."""
        self._close()
        return self._process.wait()

    def _close(self) -> None:
        if self._write_end is not None:
            os.close(self._write_end)
            self._write_end = None


def _stop_group(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM everybody in this group but the launcher, then SIGKILL what is left."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    os.killpg(0, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the launcher process."""
    pipe, command = int(arguments[0]), list(arguments[1:])
    # An asking process that ignores SIGINT must not hand that on to training processes.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(command, close_fds=True)
    child_fd = os.pidfd_open(child.pid)
    poller = select.poll()
    poller.register(pipe, select.POLLIN | select.POLLHUP)
    poller.register(child_fd, select.POLLIN)
    while child.poll() is None:
        if any(fd == pipe for fd, _ in poller.poll()):
            _stop_group(child)
    code = child.returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
