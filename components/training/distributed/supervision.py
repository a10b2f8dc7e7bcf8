"""Launches the ranks of a training run, restarts them, and says what went wrong.

torchrun restarts all ranks of a run when one of them fails; every rank then loads the newest
checkpoint. What torchrun does not know is added here: failures that come back at every attempt end
the run at once, and ranks that stand still are killed so that they count as failed.

Layout below a run's state folder: `ranks/0001/` holds the logs of the first launch (torchrun's own
in `torchrun.log`, those of a rank in `*/attempt_0/0/`), `restarts.jsonl` a line per restart.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from components.settings.runtime import RuntimeSettings
from components.telemetry.last_words import last_words
from components.training.distributed.interruption import (
    SIGNALS,
    StopRequest,
    listening,
    raise_interruption,
)
from components.training.distributed.ranks import HEARTBEATS, training_environment

RESTARTS_FILE = "restarts.jsonl"
LOGS_FOLDER = "ranks"
# torchrun sets it for every rank and reads the file when the rank has failed.
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# The only trace of a rank that a signal ended: it wrote no report.
_FAILED = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
# Of lines that a rank wrote, as opposed to torchrun's own.
_ROLE = "rank"
_FROM_RANK = re.compile(rb"^\[" + _ROLE.encode() + rb"\d+\]:")
_POLL_S = 0.2
# Ends torchrun, which then ends its ranks.
_END = signal.SIGQUIT


class TrainingFailed(RuntimeError):
    """The ranks failed more often than they may restart; a retry goes on from the checkpoint."""


class TrainingRefused(TrainingFailed):
    """A rank failed in a way that a retry would repeat."""


@dataclass(frozen=True)
class RankFailure:
    """Why an attempt ended."""

    attempt: int
    """0 is the first start of a launch."""
    rank: int | None
    """None: no rank in particular."""
    reason: str
    """One line."""
    is_lasting: bool = False
    """Whether the next attempt would end the same way."""

    def __str__(self) -> str:
        """`rank 1: why`."""
        return self.reason if self.rank is None else f"rank {self.rank}: {self.reason}"


def launch(
    module: str,
    arguments: list[str],
    runtime: RuntimeSettings,
    state_dir: Path,
    *,
    joins: bool = False,
) -> None:
    """Run `python -m module arguments` in every rank of this node and wait.

    On one node torchrun listens on the loopback interface alone. The ranks hold the read end of a
    pipe to this process and stop when it closes, so they never outlive it (`exit_with_parent`).

    Args:
        module: calls `reporting_failures` in its entry point.
        arguments: of the module.
        runtime: processes, nodes, restarts and time limit.
        state_dir: of the run; logs and the list of restarts go there.
        joins: whether another node keeps the list of restarts.

    Raises:
        TrainingRefused: a failure that a retry would repeat.
        TrainingFailed: any other, after `runtime.max_restarts` restarts.
    """
    # A folder for each launch: torchrun counts attempts from 0 again.
    logs = _new_logs_folder(state_dir)
    beats = logs / "beats"
    beats.mkdir()
    environment = {**os.environ, **training_environment(runtime.device, runtime.nodes == 1)}
    # torchrun would set one thread a rank, and sums depend on the number.
    environment |= {"OMP_NUM_THREADS": str(runtime.torch_threads), HEARTBEATS: str(beats.resolve())}
    # torchrun would keep one store for all attempts, and restarted ranks would find the addresses
    # of their dead predecessors in it ("Gloo connectFullMesh failed: connection refused").
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # The ranks import this project wherever they are started.
    above = Path(__file__).resolve().parents[3]
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(above), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    process = subprocess.Popen(
        [*torchrun_command(runtime, logs), "--module", module, *arguments],
        env=environment,
        # The ranks inherit the reading end; the system closes ours however this process ends.
        stdin=subprocess.PIPE,
        # Read line by line, because torchrun's own words and the ranks' come through it together.
        stderr=subprocess.PIPE,
        # torchrun gives its ranks half a minute, whatever is asked; what asks for an end comes from
        # here (`_Supervised`), and what is ignored now stays so in a program that does not ask.
        preexec_fn=_ignore_stop_signals,
    )
    # All nodes restart together; one list is enough, and the first node keeps it.
    restarts_file = logs / RESTARTS_FILE if joins else state_dir / RESTARTS_FILE
    supervised = _Supervised(process, logs, runtime, restarts_file)
    try:
        with listening() as stop:
            code = supervised.wait(stop)
    except BaseException:
        # After a second Ctrl-C too: torchrun passes the signal on and waits for its ranks.
        process.send_signal(_END)
        process.wait()
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()
    raise_interruption(state_dir, state_dir.parent.name)
    if code:
        failure = supervised.last_failure()
        kind = TrainingRefused if failure.is_lasting else TrainingFailed
        count = f" after {failure.attempt} restarts" if failure.attempt else ""
        raise kind(f"{failure}{count} (logs: {logs})")


def _ignore_stop_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def torchrun_command(runtime: RuntimeSettings, logs: Path) -> list[str]:
    """The launcher's command line up to the module."""
    if runtime.nodes == 1:
        # Port 0 is any free one, so two runs on a machine do not meet. Without an address torchrun
        # looks up the host's own name, which need not resolve.
        where = ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        where = [f"--rdzv-endpoint={runtime.rendezvous_endpoint}", "--rdzv-id=ultraflux"]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", *where),
        f"--nnodes={runtime.nodes}",
        f"--nproc-per-node={runtime.processes}",
        f"--max-restarts={runtime.max_restarts}",
        f"--log-dir={logs}",
        # 3: standard output and standard error, each to the terminal and to a file of the rank.
        "--tee=3",
        # The others are handled by this module and by the ranks.
        f"--signals-to-handle={_END.name}",
        # Stands before every line of a rank, which `_FROM_RANK` recognises.
        f"--role={_ROLE}",
    ]


def _new_logs_folder(state_dir: Path) -> Path:
    base = state_dir / LOGS_FOLDER
    base.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(path.name) for path in base.iterdir() if path.name.isdigit()]
        folder = base / f"{max(numbers, default=0) + 1:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            # Another node was faster.
            continue
        return folder


class _Supervised:
    """A running torchrun."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        logs: Path,
        runtime: RuntimeSettings,
        restarts_file: Path,
    ) -> None:
        self._process = process
        self._logs = logs
        self._runtime = runtime
        self._restarts = restarts_file
        self._exits: list[tuple[int, int]] = []
        self._stalled: dict[int, str] = {}
        self._final: RankFailure | None = None

    def wait(self, stop: StopRequest) -> int:
        """The exit code; meanwhile look for restarts, lasting failures and ranks that stall.

        Args:
            stop: passed on to the ranks once, which have `runtime.grace_s` to save and end.
        """
        assert self._process.stderr is not None
        reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        reader.start()
        # What the beats' times are does not matter, only that they change: a clock that is set, or
        # another machine's, says nothing about the ranks.
        seen, beats, moved = self.attempts(), self._beats(), time.monotonic()
        told = 0.0
        while self._process.poll() is None:
            time.sleep(_POLL_S)
            if stop and not told:
                told = time.monotonic()
                self._signal_ranks(signal.SIGUSR1)
            elif told and time.monotonic() - told > self._runtime.grace_s:
                self._process.send_signal(_END)
                break
            if self.attempts() > seen:
                self._restarted(seen)
                seen, moved = self.attempts(), time.monotonic()
            # Ranks meet at every step, so when one stands still all do: any beat speaks for all.
            if (now := self._beats()) != beats:
                beats, moved = now, time.monotonic()
            limit_s = self._runtime.collective_timeout_minutes * 60
            # `seen` is 0 until torchrun has started ranks, and no attempt is killed twice.
            if seen and seen - 1 not in self._stalled and time.monotonic() - moved > limit_s:
                self._kill_ranks(seen - 1)
        self._process.wait()
        # torchrun's last words, which name the failure, may still be in the pipe.
        reader.join()
        return self._process.returncode

    def attempts(self) -> int:
        """How often torchrun has started the ranks."""
        # Its folders are the only sign of a restart that torchrun gives to the outside.
        return len(list(self._logs.glob("*/attempt_*")))

    def last_failure(self) -> RankFailure:
        """Why there is no further attempt."""
        return self._final or self.failure(self.attempts() - 1)

    def failure(self, attempt: int) -> RankFailure:
        """The cause of an attempt's end, as opposed to what followed from it."""
        # The first to fail is the cause: the others fail with the collective that it left.
        reports = sorted(self._reports(attempt), key=lambda report: report[0])
        for _, failure in reports:
            if failure.is_lasting:
                return failure
        # Before the exit codes: the SIGKILL that they show was ours.
        if attempt in self._stalled:
            return RankFailure(attempt, None, self._stalled[attempt])
        if 0 <= attempt < len(self._exits):
            code, local_rank = self._exits[attempt]
            # Before the reports: a killed rank wrote none, and those of the others name only the
            # collective that it left.
            if code < 0:
                return self._at(attempt, local_rank, f"ended by {_signal_name(-code)}")
        if reports:
            return reports[0][1]
        if 0 <= attempt < len(self._exits):
            # It ended before `reporting_failures` was entered, such as in an import.
            words = self._last_line(attempt, local_rank)
            return self._at(attempt, local_rank, f"exit {code}: {words}")
        return RankFailure(attempt, None, f"torchrun: {_last_line(self._logs / 'torchrun.log')}")

    def _at(self, attempt: int, local_rank: int, reason: str) -> RankFailure:
        """Of a rank that torchrun names by its number on this node."""
        if self._runtime.nodes == 1:
            return RankFailure(attempt, local_rank, reason)
        return RankFailure(attempt, None, f"local rank {local_rank}: {reason}")

    def _read(self, stream: IO[bytes]) -> None:
        """Pass on what the ranks say; keep torchrun's own words in a file."""
        with (self._logs / "torchrun.log").open("wb") as log:
            for line in stream:
                if _FROM_RANK.match(line):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()
                    continue
                log.write(line)
                log.flush()
                if found := _FAILED.search(line):
                    self._exits.append((int(found[1]), int(found[2])))

    def _beats(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (self._logs / "beats").iterdir()}

    def _restarted(self, seen: int) -> None:
        """Note the restart; end the run where another attempt is pointless."""
        if not seen:
            return
        failure = self.failure(seen - 1)
        if failure.is_lasting:
            self._final = failure
            self._process.send_signal(_END)
            return
        print(f"restarted all ranks: {failure}", file=sys.stderr, flush=True)
        with self._restarts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(failure)) + "\n")

    def _kill_ranks(self, attempt: int) -> None:
        """SIGKILL, which also ends a stopped process; torchrun then restarts all."""
        minutes = self._runtime.collective_timeout_minutes
        self._stalled[attempt] = f"no rank has moved for {minutes:g} minutes"
        self._signal_ranks(signal.SIGKILL)

    def _signal_ranks(self, number: signal.Signals) -> None:
        # Ranks, or torchrun itself, may end at any moment.
        with suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(self._process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)

    def _reports(self, attempt: int) -> Iterator[tuple[float, RankFailure]]:
        """(time, failure) of the ranks that could still say why they ended."""
        for path in self._logs.glob(f"*/attempt_{attempt}/*/error.json"):
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                line = report["message"]["message"].strip().splitlines()[0]
                lasting = report.get("lasting", False)
                failure = RankFailure(attempt, int(report["rank"]), line, lasting)
                yield float(report["time"]), failure
            except (OSError, ValueError, KeyError, TypeError, IndexError):
                # Half written by a rank that was killed.
                continue

    def _last_line(self, attempt: int, rank: int) -> str:
        files = list(self._logs.glob(f"*/attempt_{attempt}/{rank}/stderr.log"))
        return _last_line(files[0]) if files else "no message"


def _last_line(path: Path) -> str:
    if not path.exists():
        return "no message"
    return last_words(path.read_text(encoding="utf-8", errors="replace"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def restarts(state_dir: Path) -> list[RankFailure]:
    """What made the ranks of a run start again, oldest first."""
    path = state_dir / RESTARTS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [RankFailure(**json.loads(line)) for line in lines]


@contextmanager
def reporting_failures(lasting: tuple[type[BaseException], ...]) -> Iterator[None]:
    """In a rank: leave the reason of a failure where launcher and torchrun look for it.

    Args:
        lasting: exceptions that the next attempt would raise again.
    """
    try:
        yield
    except Exception as problem:
        target = os.environ.get(_ERROR_FILE)
        if target:
            text = f"{type(problem).__name__}: {problem}"
            details = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
            # torchrun reads this file too and knows `message`; the other entries are ours.
            report = {
                "message": {"message": text, "extraInfo": details},
                "rank": int(os.environ["RANK"]),
                "time": time.time(),
                "lasting": isinstance(problem, lasting),
            }
            Path(target).write_text(json.dumps(report), encoding="utf-8")
            if report["lasting"]:
                # The launcher says it in one line, and the file holds where it came from.
                raise SystemExit(1) from problem
        raise
