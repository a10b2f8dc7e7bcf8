"""The pipeline's side of stages on other clones: choose a worker, send, merge what comes back.

A worker that dies in the middle loses nothing but time: dvc.lock changes when a whole reply is
here, and the stage goes to another worker. The results are the same bytes, wherever a stage ran.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.records.records import read_json, write_json
from flows.remote import data_remote
from flows.remote.remote_requests import PipelineClone
from flows.remote.remote_stage import code_commit
from flows.remote.stage_messages import StageReply, WorkerRefused, as_json, read_reply
from flows.running.execution import OUTCOME_FILE, PARENT_RECORD, PREFECT_RUN
from flows.running.runner import ProcessRunner, StageOutcome, interrupted, progress_path
from flows.versioning import graph as versioning

HELD_FILE = "runs/remote/held.json"
"""Worker by stage: where finished results wait for the remote to come back."""
LOSSES_UNTIL_LEFT_OUT = 2


def checked_workers(root: Path, folders: Sequence[Path]) -> list[Path]:
    """Worker clones as absolute folders.

    Raises:
        WorkerRefused: none or no clone, this clone itself, another commit, uncommitted changes.
    """
    commit = code_commit(root)
    workers = list(dict.fromkeys(folder.resolve() for folder in folders))
    if not workers:
        raise WorkerRefused("--engine remote needs at least one --worker CLONE")
    for worker in workers:
        if worker == root.resolve():
            raise WorkerRefused(
                f"--worker {worker} is the pipeline's own clone: `git clone {root} ELSEWHERE`"
            )
        if not (worker / "dvc.yaml").is_file():
            raise WorkerRefused(f"--worker {worker}: no clone of this project there")
        here = code_commit(worker)
        if here != commit:
            raise WorkerRefused(
                f"--worker {worker} is at commit {here[:12]}, this clone at {commit[:12]}: "
                f"`git fetch && git checkout {commit[:12]}` there"
            )
    return workers


class RemoteRunner(ProcessRunner):
    """Runs stages of one pipeline run in other clones, one at a time in each."""

    def __init__(
        self,
        root: Path,
        graph: dict[str, versioning.StageNode],
        *,
        parent_record: str,
        stale: dict[str, str],
        workers: Sequence[Path],
        say: Callable[[str], None],
        force: bool = False,
        held: Sequence[int] = (),
    ) -> None:
        """As the base.

        Args:
            root: the pipeline's clone.
            graph: all stages.
            parent_record: record id of the pipeline run.
            stale: stages that have to run, with reasons.
            workers: clones (`checked_workers`).
            say: told one line when a worker is lost.
            force: run stages even when nothing changed.
            held: descriptor of the clone's lock.
        """
        super().__init__(root, graph, stale=stale, force=force, held=held)
        self._clone = PipelineClone(
            root,
            graph,
            parent_record=parent_record,
            force=force,
            stopping=lambda: self._stopping,
        )
        self._workers = list(workers)
        self._say = say
        self._free = list(workers)
        self._losses = dict.fromkeys(workers, 0)
        self._noting = threading.Lock()

    def _run(self, name: str, prefect_run: str | None) -> StageOutcome:
        lost: list[Path] = []
        while True:
            worker = self._take(name, lost)
            if self._stopping:
                return interrupted(name)
            if worker is None:
                names = ", ".join(str(one) for one in lost)
                message = f"{name}: lost with its worker {names} (log: runs/logs/{name}.log)"
                return StageOutcome(name, "failed", message=message)
            try:
                reply = self._send(worker, name, prefect_run)
            finally:
                self._give_back(worker)
            self._losses[worker] = 0 if reply else self._losses[worker] + 1
            if reply is not None:
                return self._accept(name, worker, reply)
            if not self._stopping:
                lost.append(worker)
                self._say(f"{name}: worker {worker} ended without an answer; sent to another one")

    def _take(self, name: str, lost: Sequence[Path]) -> Path | None:
        """A free worker for a stage, None when every one has lost it."""
        with self._changed:
            while not self._stopping:
                wanted = self._candidates(name, lost)
                if not wanted:
                    return None
                free = [worker for worker in wanted if worker in self._free]
                if free:
                    self._free.remove(free[0])
                    return free[0]
                self._changed.wait()
        return None

    def _candidates(self, name: str, lost: Sequence[Path]) -> list[Path]:
        """Workers to ask, best first: where the result lies already, then those never lost."""
        possible = [worker for worker in self._workers if worker not in lost]
        holder = (read_json(self.root / HELD_FILE) or {}).get(name)
        if holding := [worker for worker in possible if str(worker) == holder]:
            return holding
        healthy = [one for one in possible if self._losses[one] < LOSSES_UNTIL_LEFT_OUT]
        return sorted(healthy or possible, key=lambda worker: self._losses[worker])

    def _give_back(self, worker: Path) -> None:
        with self._changed:
            self._free.append(worker)
            self._changed.notify_all()

    def _send(self, worker: Path, name: str, prefect_run: str | None) -> StageReply | None:
        """Run one request in `worker`; None when it ended without a reply."""
        request = self._clone.request(name)
        log = self._clone.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        progress_path(worker, name).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
            question, answer = Path(folder) / "request.json", Path(folder) / "reply.json"
            write_json(question, as_json(request))
            command = [*_program(worker), "stage", "remote", str(question), "--reply", str(answer)]
            env = _environment(worker, prefect_run)
            with self._process(name, command, cwd=worker, env=env, output=output) as process:
                if process is None:
                    return None
                process.wait()
            values = read_json(answer)
        try:
            return None if values is None else read_reply(values)
        except WorkerRefused as problem:
            return StageReply("refused", f"{name}: {problem}")

    def _accept(self, name: str, worker: Path, reply: StageReply) -> StageOutcome:
        """Merge a reply into this clone."""
        with self._noting:
            self._note_held(name, worker if reply.status == "unpushed" else None)
        return self._clone.accept(name, reply, str(worker))

    def _note_held(self, name: str, worker: Path | None) -> None:
        held = read_json(self.root / HELD_FILE) or {}
        now = {stage: where for stage, where in held.items() if stage != name}
        if worker is not None:
            now[name] = str(worker)
        if now != held:
            write_json(self.root / HELD_FILE, now)


def send_present_results(root: Path, stale: dict[str, str]) -> None:
    """Push what this clone has of up-to-date stages, so that workers find their inputs.

    Raises:
        RemoteFailed: the remote does not answer.
    """
    done = [name for name in versioning.read_lock(root) if name not in stale]
    with versioning.open_repo(root) as repo:
        present = []
        for name in done:
            stage = repo.stage.load_one(path=str(root / "dvc.yaml"), name=name)
            present += [str(out.def_path) for out in stage.outs if not out.changed_cache()]
    data_remote.push(root, present)


def _program(worker: Path) -> list[str]:
    """`ultraflux` of the worker's own environment, where it has one."""
    own = worker / ".venv" / "bin" / "python"
    return [str(own) if own.is_file() else sys.executable, "-m", "flows.cli"]


def _environment(worker: Path, prefect_run: str | None) -> dict[str, str]:
    """This environment, with the worker's code first and nothing of stages around this one."""
    left_out = {PARENT_RECORD, OUTCOME_FILE, PREFECT_RUN, "PYTHONPATH"}
    env = {key: value for key, value in os.environ.items() if key not in left_out}
    # An editable installation elsewhere must not stand in for the worker's own code.
    others = os.environ.get("PYTHONPATH")
    env["PYTHONPATH"] = os.pathsep.join([str(worker), *([others] if others else [])])
    if prefect_run is not None:
        env[PREFECT_RUN] = prefect_run
    return env
