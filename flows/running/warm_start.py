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
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.running import guarded_process
from flows.running.stage_forks import (
    MESSAGE_BYTES,
    TITLE_SWITCH,
    StageForks,
    as_started,
    fork,
    run_role,
    title,
)

if TYPE_CHECKING:
    from components.settings.runtime import RuntimeSettings

_NETWORKS = frozenset(
    ("text_embeddings", "vae", "latents", "dit_stage1", "dit_stage2", "generate", "evaluate")
)
PRELOADS: tuple[tuple[str, frozenset[str] | None], ...] = (
    ("dvc.cli", None),
    ("dvc.commands.repro", None),
    ("dvc.repo.reproduce", None),
    ("typer", None),
    ("pydantic", None),
    ("psutil", None),
    ("pyarrow.parquet", None),
    ("pandas", None),
    ("PIL.Image", None),
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
_ANSWER_S = 120.0
_LOOK_AHEAD = 2
"""Stages for which is imported while those before them run."""


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


def _python_path() -> str:
    """PYTHONPATH with this code first: on it may be another project's `components`."""
    code = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([code, *filter(None, [os.environ.get("PYTHONPATH")])])


class WarmStart:
    """The process that has the imports, as a pipeline run holds it."""

    def __init__(self, root: Path, stages: Sequence[str], *, runtime: RuntimeSettings) -> None:
        """Start it; it begins to import at once.

        Args:
            root: the clone.
            stages: those that are going to run, in order.
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
                env=os.environ | {TITLE_SWITCH: "1", "PYTHONPATH": _python_path()},
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
        """End it, also within an import; launchers and stages go on."""
        self._asked.close()
        self._process.kill()
        self._process.wait()


def wanted_modules(stages: Sequence[str], *, cuda: bool) -> dict[str, list[str]]:
    """Modules to import ahead by stage, of those that at least two of `stages` import.

    Args:
        stages: those that are going to run, in order.
        cuda: whether they use CUDA: a process that was forked after the driver has been asked for
            devices, as bitsandbytes and deepspeed do at import, cannot use it any more.
    """
    shared = [
        (module, needed_by)
        for module, needed_by in PRELOADS
        if len(stages if needed_by is None else needed_by & set(stages)) > 1
        and not (cuda and needed_by is not None and needed_by <= _NETWORKS)
    ]
    return {
        stage: [module for module, needed_by in shared if needed_by is None or stage in needed_by]
        for stage in stages
    }


def serve(asked: socket.socket, wanted: Mapping[str, Any]) -> int:
    """Import, and fork a launcher for each request, until whoever asks has ended."""
    from flows import environment

    # Nobody waits for launchers here: whoever asked for one hears from itself how it ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # A stage sets the same before it imports torch.
    environment.prepare(
        offline=wanted["offline"], torch_threads=wanted["torch_threads"], root=Path.cwd()
    )
    modules: dict[str, list[str]] = wanted["modules"]
    order = list(modules)
    # Of the stages that are about to run; a run may end long before it needs the others.
    coming = list(modules[order[0]])
    while True:
        # Requests come first; an import that has begun is finished.
        asked.settimeout(0.0 if coming else None)
        try:
            data, fds, _, _ = socket.recv_fds(asked, MESSAGE_BYTES, 64)
        except BlockingIOError:
            _import(coming.pop(0))
            continue
        if not data:
            return 0
        request = json.loads(data)
        at = next((n for n, stage in enumerate(order) if stage in request["command"]), None)
        if at is not None:
            # What the fork would import by itself, others would import again.
            for module in modules[order[at]]:
                _import(module)
            coming = [m for stage in order[at + 1 : at + 1 + _LOOK_AHEAD] for m in modules[stage]]

        def launcher(request: dict[str, Any] = request, fds: list[int] = fds) -> int:
            asked.close()
            return _launcher(request, fds)

        fork(launcher)
        for fd in fds:
            os.close(fd)


def _import(module: str) -> None:
    if module in sys.modules:
        return
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
        as_started(request["cwd"], request["env"], (os.open(os.devnull, os.O_RDONLY), output))
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


@contextmanager
def _closing(fds: Sequence[int]) -> Iterator[None]:
    """Close descriptors at the end, in children that are forked within too."""
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def main(arguments: Sequence[str]) -> int:
    """Entry point: descriptor of the socket, and what to import."""
    asked = socket.socket(fileno=int(arguments[0]))
    return run_role(lambda: serve(asked, json.loads(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
