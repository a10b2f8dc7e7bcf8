"""Forked children that are processes like any others, and stages that are forked where asked for.

A launcher that was forked itself (`flows.running.warm_start`) forks stages, too: the command of
dvc.yaml asks it over a socket and stands for the stage meanwhile, with its standard streams, its
signals and its exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import secrets
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from flows.running import guarded_process

STAGE_SOCKET = "ULTRAFLUX_STAGE_SOCKET"
"""Where a launcher forks stages, in the environment of what it runs."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MESSAGE_BYTES = 1 << 20
TITLE_SWITCH = "SPT_NOENV"
"""Keeps setproctitle out of the environment's place."""
_STREAMS = 3
_CREDENTIALS = struct.Struct("3i")


class Fork(BaseException):
    """Unwinds the stack of a forked child up to `run_role`, which goes on with its role.

    Not an `Exception`: whoever forks must not take it for a failure.
    """

    def __init__(self, role: Callable[[], int]) -> None:
        """The child is to run `role` and end with what it returns."""
        super().__init__()
        self.role = role


def fork(role: Callable[[], int]) -> int:
    """Process id of a child that unwinds its stack and runs `role`.

    Raises:
        Fork: in the child.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    raise Fork(role)


def run_role(role: Callable[[], int]) -> int:
    """Run `role`, and in children that it forks theirs; the exit code of whichever this is."""
    while True:
        try:
            return role()
        except Fork as forked:
            role = forked.role


def title(words: Sequence[str]) -> None:
    """What `ps` shows for this process: the command line that it would have been started by."""
    with suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(" ".join(words))


def as_started(cwd: str, env: Mapping[str, str], streams: Sequence[int]) -> None:
    """This process as if it had been started so.

    Args:
        cwd: its folder.
        env: its environment.
        streams: descriptors of standard input, output and (default: as output) error.
    """
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.environ.pop(TITLE_SWITCH, None)
    for number, stream in enumerate((*streams, streams[-1])[:_STREAMS]):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)


class StageForks:
    """Stages that a launcher forks for commands in its group that ask for them."""

    def __init__(self) -> None:
        """Listen, and say where in the environment.

        Under an abstract name, so that no kill leaves a file; the peer's user is checked.
        """
        self._asking: dict[int, tuple[socket.socket, guarded_process.Forked, int]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = f"ultraflux-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener.bind("\0" + name)
        self._listener.listen()
        os.environ[STAGE_SOCKET] = name

    def __enter__(self) -> StageForks:
        return self

    def __exit__(self, *problem: object) -> None:
        self._listener.close()
        for fd in list(self._asking):
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        connection, _, ended = self._asking.pop(fd)
        connection.close()
        os.close(ended)

    def fds(self) -> list[int]:
        """Descriptors that say something, for `handle` or by the end of a stage."""
        ends = [ended for _, _, ended in self._asking.values()]
        return [self._listener.fileno(), *self._asking, *ends]

    def handle(self, fd: int) -> None:
        """See to what came in at `fd`: a new command, a signal for its stage, or its end."""
        if fd == self._listener.fileno():
            self._begin()
        if fd not in self._asking:
            return
        connection, stage, _ = self._asking[fd]
        said = b""
        with suppress(OSError):
            said = connection.recv(64)
        # A command that was killed takes its stage with it, as it did when it was the stage.
        number = int(said) if said else signal.SIGKILL
        if stage.poll() is None:
            os.kill(stage.pid, number)
        if not said:
            self._forget(fd)

    def answer(self) -> None:
        """Tell commands whose stages have ended."""
        for fd, (connection, stage, _) in list(self._asking.items()):
            if (code := stage.poll()) is not None:
                with suppress(OSError):
                    connection.send(str(code).encode())
                self._forget(fd)

    def _begin(self) -> None:
        connection, _ = self._listener.accept()
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(peer)[1] != os.getuid():
            connection.close()
            return
        data, streams, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, _STREAMS)
        if len(streams) < _STREAMS:
            connection.close()
            return
        asked = json.loads(data)

        def stage() -> int:
            connection.close()
            return _stage(asked, streams)

        pid = fork(stage)
        for stream in streams:
            os.close(stream)
        begun = guarded_process.Forked(pid)
        self._asking[connection.fileno()] = (connection, begun, os.pidfd_open(pid))


def _stage(asked: Mapping[str, Any], streams: Sequence[int]) -> int:
    as_started(asked["cwd"], asked["env"], streams)
    os.environ.pop(STAGE_SOCKET, None)
    title(asked["words"])
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(asked["words"])[1:]
    # The program that asks, which finds no launcher this time.
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def ask_launcher(words: Sequence[str]) -> int | None:
    """Have the launcher above fork the stage of this command, and wait for it.

    Args:
        words: the command line of this process, the interpreter first.

    Returns:
        Exit code, negative for a signal; None: there is no launcher that forks.
    """
    name = os.environ.get(STAGE_SOCKET)
    # In another group (a terminal's, a server's below a stage) this command is not the launcher's.
    if name is None or os.environ.get(guarded_process.LAUNCHER) != str(os.getpgrp()):
        return None
    asked = {"words": list(words), "cwd": str(Path.cwd()), "env": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as launcher:
        try:
            launcher.connect("\0" + name)
            socket.send_fds(launcher, [json.dumps(asked).encode()], range(_STREAMS))
        except OSError:
            return None

        def forward(number: int, frame: FrameType | None) -> None:
            with suppress(OSError):
                launcher.send(str(number).encode())

        for number in FORWARDED:
            signal.signal(number, forward)
        said = b""
        with suppress(OSError):
            said = launcher.recv(64)
    # Without a word the launcher was killed, and this group with it.
    return int(said) if said else -signal.SIGKILL
