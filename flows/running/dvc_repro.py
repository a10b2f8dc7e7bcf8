"""Run one stage of the graph in this clone, through DVC.

`dvc --wait-for-lock repro -s NAME` in a guarded process group: DVC decides whether there is
anything to do and restores from its run cache where it can; the stage itself reports through an
outcome file. The flag stands before the subcommand on purpose: without it a finished stage loses
its result when another dvc process holds the repository lock for three seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from components.settings.schema import load_settings
from components.telemetry.progress import PROGRESS_FILE
from flows.records.records import Record, read_json, records_dir
from flows.running.clone_lock import stage_lock
from flows.running.gpu_lock import WAITING_VARIABLE
from flows.running.guarded_process import GRACE_S, GuardedProcess
from flows.running.recorded_stage import FORCED, OUTCOME_FILE, PARENT_RECORD, PREFECT_RUN
from flows.running.shared_turns import shared_turn
from flows.running.stage_runner import OutcomeStatus, StageOutcome, interrupted
from flows.running.warm_start import WarmStart
from flows.versioning import graph as versioning
from flows.versioning.lock_hashes import out_hashes
from flows.versioning.torn_files import mend_after_kills, mend_lock

TIMEOUT_STEP_S = 5.0
BUSY_MARK = "is busy, it is being blocked by"
BUSY_PATIENCE_S, BUSY_PAUSE_S = 120.0, 1.0
_BY_SIGNAL = re.compile(r"exited with -(\d+)$")
"""How DVC says that a signal ended a stage's command."""
ATTEMPTS = "runs/attempts"
"""Folders in which stages and whoever asked for them talk."""


class CpuSlots:
    """Cores of this machine, handed out by the number that a stage says it needs."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        """Wait until `wanted` cores (at most all) are free and hold them."""
        # A stage that wants more than the machine has gets all of it instead of waiting for ever.
        count = min(wanted, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


def progress_path(clone: Path, stage: str) -> Path:
    """Where a stage that runs in `clone` writes its position."""
    return clone / "runs" / "progress" / f"{stage}.json"


class DvcRunner:
    """Runs stages of one pipeline run in this clone: skips, knows what runs now, and stops it."""

    without_server = "the pipeline goes on without it"

    def __init__(
        self,
        root: Path,
        graph: dict[str, versioning.StageNode],
        *,
        parent_record: str | None,
        stale: dict[str, str],
        cpus: int | None = None,
        force: bool = False,
        held: Sequence[int] = (),
        warm: WarmStart | None = None,
    ) -> None:
        """Prepare for the stages of `graph`.

        Args:
            root: repository root.
            graph: all stages.
            parent_record: record id of the pipeline run; None for a stage on its own, which then
                uploads its record itself.
            stale: stages that need looking at, with reasons; others are skipped at once.
            cpus: cores to hand out (default: all of this machine).
            force: run stages even when nothing changed.
            held: descriptor of the clone's lock, which the processes are to hold too.
            warm: has the imports of the stages; None: each process imports for itself.
        """
        self.root = root
        self.graph = graph
        self.stale = stale
        self.force = force
        self.parent_record = parent_record
        self._held = tuple(held)
        self._warm = warm
        self._slots = CpuSlots(cpus or os.cpu_count() or 1)
        self._running: dict[str, GuardedProcess] = {}
        # Reentrant: a signal handler calls `stop` in a thread that may hold it.
        self._lock = threading.RLock()
        self._stopping = False

    def run(self, name: str, *, prefect_run: str | None = None) -> StageOutcome:
        """Run (or skip) one stage; never raises for a failing stage."""
        # No dvc process for a stage that is known to be current: starting one costs seconds.
        if name not in self.stale and not self.force:
            return StageOutcome(name, "skipped", message="unchanged")
        return self._run(name, prefect_run)

    def _run(self, name: str, prefect_run: str | None) -> StageOutcome:
        node = self.graph[name]
        with (
            # The turn before the cores: a stage that waits for another tree must not keep cores
            # from this one.
            shared_turn(self.root, name, lambda: self._stopping),
            self._slots.take(node.meta.cpus),
        ):
            # Both waits above end when the run is stopped, with nothing to start.
            if self._stopping:
                return interrupted(name)
            started = time.monotonic()
            outcome = self._repro(node, prefect_run, started)
            # What has just been saved is in the copy of dvc.lock before another stage saves.
            mend_lock(self.root)
        self._record_outputs(outcome)
        return outcome

    def _repro(
        self, node: versioning.StageNode, prefect_run: str | None, started: float
    ) -> StageOutcome:
        name = node.name
        log = self.root / "runs" / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        progress = self.progress_file(name)
        progress.parent.mkdir(parents=True, exist_ok=True)
        command = ["dvc", "--wait-for-lock", "repro", "-s", name, *(["-f"] if self.force else [])]
        with _attempt_folder(self.root, name) as folder:
            outcome_file = folder / "outcome.json"
            env = os.environ | {OUTCOME_FILE: str(outcome_file), PROGRESS_FILE: str(progress)}
            waiting = folder / "waiting"
            env[WAITING_VARIABLE] = str(waiting)
            if self.parent_record is not None:
                env[PARENT_RECORD] = self.parent_record
            if prefect_run is not None:
                env[PREFECT_RUN] = prefect_run
            if self.force:
                env[FORCED] = "1"
            while True:
                code = self._attempt(node, command, env, log, waiting)
                if code is None:
                    return interrupted(name)
                said = read_json(outcome_file)
                patient = time.monotonic() - started < BUSY_PATIENCE_S
                if code == 0 or said or not patient or BUSY_MARK not in _text(log):
                    break
                # Somebody reads what this stage writes (`dvc status`, `stage list`), or what a
                # killed run had started is ending; DVC does not wait for that.
                time.sleep(BUSY_PAUSE_S)
        progress.unlink(missing_ok=True)
        seconds = time.monotonic() - started
        if code == 0:
            # DVC restored or skipped it when the stage's process said nothing.
            status: OutcomeStatus = "ran" if said else "skipped"
            message = said["message"] if said else "unchanged or restored from the DVC cache"
            return StageOutcome(name, status, seconds, message, log)
        # Where the stage finished and `dvc` failed, saving its outputs went wrong (a full disk).
        if said and said["status"] != "finished":
            refused = said["status"] == "refused"
            return StageOutcome(
                name, "refused" if refused else "failed", seconds, said["message"], log
            )
        message = f"{name}: {_last_error(log, code)} (log: {log.relative_to(self.root)})"
        return StageOutcome(name, "failed", seconds, message, log)

    def _attempt(
        self,
        node: versioning.StageNode,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        waiting: Path,
    ) -> int | None:
        """Exit code of one `dvc repro`; None after a `stop`."""
        with ExitStack() as until_begun:
            lock = until_begun.enter_context(
                stage_lock(self.root, node.name, lambda: self._stopping)
            )
            # Of a run that was killed: the bar would start where that one ended.
            self.progress_file(node.name).unlink(missing_ok=True)
            # A kill within a write leaves half a file, on which every later dvc command fails.
            mend_after_kills(self.root)
            with (
                log.open("wb") as output,
                self._process(node, command, env=env, output=output, lock=lock) as process,
            ):
                if process is None:
                    return None
                # The stage's processes hold the lock now; this one may be frozen or cut off.
                until_begun.close()
                return self._wait(process, node.meta.timeout_min, waiting)

    @contextmanager
    def _process(
        self,
        node: versioning.StageNode,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        output: IO[bytes],
        lock: int,
    ) -> Iterator[GuardedProcess | None]:
        """A stage's process, which `stop` reaches while the block lasts; None after a `stop`.

        It holds the descriptor `lock` beside those of the clone's.
        """
        name = node.name
        # A stage that trains finishes its step and saves when it is asked to stop.
        grace_s = (
            load_settings(self.root / "params.yaml").runtime.grace_s
            if node.meta.trains
            else GRACE_S
        )
        with self._lock:
            process = None
            if not self._stopping:
                process = GuardedProcess(
                    command,
                    cwd=self.root,
                    env=env,
                    output=output,
                    held=(*self._held, lock),
                    grace_s=grace_s,
                    warm=self._warm,
                )
                self._running[name] = process
        try:
            yield process
        finally:
            with self._lock:
                self._running.pop(name, None)

    def progress_file(self, name: str) -> Path:
        """Where the running stage writes its position."""
        return progress_path(self.root, name)

    def stop(self) -> None:
        """Stop every running stage; what they saved stays for the next run."""
        with self._lock:
            self._stopping = True
            running = list(self._running.values())
        for process in running:
            process.stop()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def running(self) -> list[str]:
        """Names of the stages that run now."""
        with self._lock:
            return sorted(self._running)

    def _wait(self, process: GuardedProcess, timeout_min: float, waiting: Path) -> int:
        """Wait for the end; time in which the stage waits for a GPU does not count."""
        used_s = 0.0
        while used_s < timeout_min * 60:
            begun = time.monotonic()
            try:
                return process.wait(min(TIMEOUT_STEP_S, timeout_min * 60 - used_s))
            except subprocess.TimeoutExpired:
                if not waiting.exists():
                    used_s += time.monotonic() - begun
        return process.stop()

    def _record_outputs(self, outcome: StageOutcome) -> None:
        """Note in the stage's record which output hashes DVC gave."""
        if outcome.status != "ran":
            return
        # Only now: DVC hashes outputs after the stage's process, which has closed its record by
        # then.
        entry = versioning.lock_entry(self.root, outcome.name) or {}
        hashes = out_hashes(entry)
        for folder in records_dir(self.root).glob(f"{outcome.name}-*"):
            record = Record(folder)
            if record.run.parent == self.parent_record:
                record.set_outputs(hashes)


@contextmanager
def _attempt_folder(root: Path, stage: str) -> Iterator[Path]:
    """A folder for one attempt: an outcome that an earlier one left must not speak for this one.

    Below the clone, where `ultraflux clean` finds what a killed run leaves.
    """
    folder = root / ATTEMPTS / f"{stage}-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _text(log: Path) -> str:
    return log.read_text(errors="replace")


def _last_error(log: Path, code: int) -> str:
    """The line of a log that says most about a failure."""
    lines = [line.strip() for line in _text(log).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    if code in {137, 143, -9, -15}:
        return "killed"
    said = (errors or lines or [f"exit code {code}"])[-1]
    if ended := _BY_SIGNAL.search(said):
        name = signal.Signals(int(ended[1])).name
        # What the kernel does when memory runs out leaves no other word.
        why = "; where nobody did that, memory was full" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{why}"
    return said
