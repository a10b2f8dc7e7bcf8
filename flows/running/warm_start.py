"""Processes of a pipeline run that begin with other people's libraries imported.

`dvc repro -s NAME` and the stage below it import for 3 to 10 CPU seconds before they do anything,
and a run starts both for each of its stages. Here one process imports once: `WarmStart` starts this
module as a program, which imports what the stages to come need and then forks for each of them a
launcher (`flows.running.guarded_process`), which forks `dvc`. `dvc` starts its shell and the
command of dvc.yaml as ever; where that is `ultraflux stage run NAME`, the command
(`flows.entry`) only asks the launcher for a fork, hands over its standard streams, passes signals
on and ends as the stage ends. So stages are as isolated as before: processes of their own, with
their environment, in the launcher's group.

Only libraries are imported ahead, never our own modules: code that was edited while a run goes on
is read by each stage anew, and compared with the fingerprint that the run began with. The process
forks while it has one thread; what its imports bring up (OpenBLAS) knows about forks. When it dies
or does not answer, stages start cold, as they do under a `dvc repro` that a person types.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from flows.running import guarded_process

if TYPE_CHECKING:
    from components.settings.runtime import RuntimeSettings

_NETWORKS = frozenset(
    ("text_embeddings", "vae", "latents", "dit_stage1", "dit_stage2", "generate", "evaluate")
)
PRELOADS: tuple[tuple[str, frozenset[str] | None], ...] = (
    *(
        (module, None)
        for module in ("dvc.cli", "dvc.commands.repro", "dvc.repo", "dvc.repo.reproduce")
    ),
    *(
        (module, None)
        for module in ("typer", "pydantic", "psutil", "pyarrow.parquet", "pandas", "PIL.Image")
    ),
    ("great_expectations", frozenset(("ingest", "select", "validate"))),
    ("cv2", frozenset(("signals", "quality", "people"))),
    ("torch", _NETWORKS),
    ("transformers.modeling_utils", _NETWORKS),
    ("deepspeed", frozenset(("text_embeddings", "dit_stage1", "dit_stage2"))),
    (
        "diffusers.models.autoencoders.autoencoder_kl",
        frozenset(("vae", "latents", "generate", "evaluate")),
    ),
    (
        "diffusers.models.transformers.transformer_flux",
        frozenset(("dit_stage1", "dit_stage2", "generate")),
    ),
)
"""Modules to import ahead, in this order, and the stages whose process needs them (None: all)."""
STAGE_SOCKET = "ULTRAFLUX_STAGE_SOCKET"
"""Where a launcher forks stages, in the environment of what it runs."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_MESSAGE_BYTES = 1 << 20
_ANSWER_S = 30.0
_STREAMS = 3
_CREDENTIALS = struct.Struct("3i")
_TITLE_SWITCH = "SPT_NOENV"


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


class WarmProcess:
    """A launcher that was forked, asked as `subprocess.Popen` is; by several threads at a time."""

    def __init__(self, pid: int, answers: socket.socket) -> None:
        """The launcher `pid`, which sends its exit code over `answers` before it ends."""
        self.pid = pid
        self._answers = answers
        self._code: int | None = None
        self._lock = threading.Lock()
        try:
            self._running: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._running = None

    def __del__(self) -> None:
        if self._running is not None:
            os.close(self._running)

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: still running after `timeout` seconds.
        """
        if self._running is not None:
            poller = select.poll()
            poller.register(self._running, select.POLLIN)
            if not poller.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(f"launcher {self.pid}", timeout or 0.0)
        with self._lock:
            if self._code is None:
                said = self._answers.recv(64)
                # It says nothing when it was killed.
                self._code = int(said) if said else -signal.SIGKILL
                self._answers.close()
            return self._code


class WarmStart:
    """The process that has the imports, as a pipeline run holds it."""

    def __init__(self, root: Path, stages: Collection[str], *, runtime: RuntimeSettings) -> None:
        """Start it; it begins to import at once.

        Args:
            root: the clone.
            stages: those that are going to run.
            runtime: the stages' device, threads (which libraries read at import) and hub.
        """
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            wanted = {
                "modules": wanted_modules(stages, cuda=runtime.device != "cpu"),
                "offline": runtime.offline,
                "torch_threads": runtime.torch_threads,
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(its.fileno()), json.dumps(wanted)],
                cwd=root,
                # A title as long as a command line needs room, which that of this program has;
                # taken from the environment, a look into /proc would not find that any more.
                env=os.environ | {_TITLE_SWITCH: "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(its.fileno(),),
                start_new_session=True,
            )
        self._asked = ours

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
    ) -> WarmProcess | None:
        """A launcher for `command` (`dvc ...`), None where none could be forked.

        Args:
            command: program and arguments.
            cwd: its folder.
            env: its environment.
            output: descriptor for its standard output and error.
            pipe: read end of the pipe that ends it.
            held: descriptors that it keeps open until its group is gone.
            grace_s: between SIGTERM and SIGKILL.
        """
        request = {"command": list(command), "cwd": str(cwd), "env": dict(env), "grace_s": grace_s}
        answers, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with its:
                data = json.dumps(request).encode()
                socket.send_fds(self._asked, [data], [its.fileno(), output, pipe, *held])
            # It may be within an import.
            answers.settimeout(_ANSWER_S)
            pid = answers.recv(64)
        except OSError:
            # A launcher that is forked later cannot say that it is there, and ends.
            pid = b""
        if not pid:
            answers.close()
            return None
        answers.settimeout(None)
        return WarmProcess(int(pid), answers)

    def close(self) -> None:
        """End it; launchers and stages go on."""
        self._asked.close()
        self._process.wait()


def wanted_modules(stages: Collection[str], *, cuda: bool) -> list[str]:
    """Modules that at least two of `stages` import, in the order of `PRELOADS`.

    Args:
        stages: those that are going to run.
        cuda: whether they use CUDA: a process that was forked after the driver has been asked for
            devices, as bitsandbytes and deepspeed do at import, cannot use it any more.
    """
    return [
        module
        for module, needed_by in PRELOADS
        if len(stages if needed_by is None else needed_by & set(stages)) > 1
        and not (cuda and needed_by is not None and needed_by <= _NETWORKS)
    ]


def title(words: Sequence[str]) -> None:
    """What `ps` shows for this process: the command line that it would have been started by."""
    with suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(" ".join(words))


def serve(asked: socket.socket, wanted: Mapping[str, Any]) -> int:
    """Import, and fork a launcher for each request, until whoever asks has ended."""
    from flows import environment

    # Nobody waits for launchers here: whoever asked for one hears from itself how it ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    modules = list(wanted["modules"])
    while True:
        # Requests come first; an import that has begun is finished.
        asked.settimeout(0.0 if modules else None)
        try:
            data, fds, _, _ = socket.recv_fds(asked, _MESSAGE_BYTES, 64)
        except BlockingIOError:
            _import(modules.pop(0))
            continue
        if not data:
            return 0
        request = json.loads(data)
        # A stage sets the same before it imports torch.
        environment.prepare(offline=wanted["offline"], torch_threads=wanted["torch_threads"])

        def launcher(request: dict[str, Any] = request, fds: list[int] = fds) -> int:
            asked.close()
            return _launcher(request, fds)

        fork(launcher)
        for fd in fds:
            os.close(fd)


def _import(module: str) -> None:
    # An optional library that is missing, or broken, is the stage's to complain about.
    with suppress(Exception):
        importlib.import_module(module)


def _launcher(request: Mapping[str, Any], fds: Sequence[int]) -> int:
    """A launcher's life: as `guarded_process.main`, with stages forked where they are asked for."""
    answer, output, pipe, *held = fds
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with _closing((answer, pipe, *held)):
        try:
            os.write(answer, str(os.getpid()).encode())
        except OSError:
            return 1
        title([sys.executable, guarded_process.__file__, *request["command"]])
        _as_started(request["cwd"], request["env"], (os.open(os.devnull, os.O_RDONLY), output))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ[guarded_process.LAUNCHER] = str(os.getpid())
        with StageForks() as stages:
            command = guarded_process.Forked(fork(lambda: _dvc(request["command"])))
            code = guarded_process.guard(pipe, request["grace_s"], command, stages)
        with suppress(OSError):
            os.write(answer, str(code).encode())
        # At once: whoever asked goes on when the locks that are held here are free.
        os._exit(code)


def _dvc(command: Sequence[str]) -> int:
    guarded_process.die_with_parent()
    title(command)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(command)
    from dvc.cli import main

    return int(main(list(command[1:])))


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
        data, streams, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, _STREAMS)
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
    _as_started(asked["cwd"], asked["env"], streams)
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


@contextmanager
def _closing(fds: Sequence[int]) -> Iterator[None]:
    """Close descriptors at the end, in children that are forked within too."""
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def _as_started(cwd: str, env: Mapping[str, str], streams: Sequence[int]) -> None:
    """This process as if it had been started so.

    Args:
        cwd: its folder.
        env: its environment.
        streams: descriptors of standard input, output and (default: as output) error.
    """
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.environ.pop(_TITLE_SWITCH, None)
    for number, stream in enumerate((*streams, streams[-1])[:_STREAMS]):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)


def main(arguments: Sequence[str]) -> int:
    """Entry point: descriptor of the socket, and what to import."""
    asked = socket.socket(fileno=int(arguments[0]))
    return run_role(lambda: serve(asked, json.loads(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
