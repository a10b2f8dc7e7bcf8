"""The pipeline's clone towards workers in others: what it asks them, what a reply changes in it.

Whoever carries the messages (`flows.pools.remote_pool_runner`: Prefect), dvc.lock changes when a
whole reply is here and its hashes fit, and not before. A worker that dies in the middle therefore
loses nothing but time: the results are the same bytes, wherever a stage runs.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.records.records import Record, records_dir
from flows.remote import data_remote
from flows.remote.lock_entries import foreign_inputs, merge_entries, needed_entries
from flows.remote.remote_stage import TRACKING_URI, code_commit
from flows.remote.stage_messages import StageReply, StageRequest, keep_files
from flows.running.stage_runner import OutcomeStatus, StageOutcome
from flows.versioning import graph as versioning

PARENT_RUN_WAIT_S = 30.0


class PipelineClone:
    """The clone that a pipeline is driven from, at one commit and with one params.yaml."""

    def __init__(
        self,
        root: Path,
        graph: Mapping[str, versioning.StageNode],
        *,
        parent_record: str,
        force: bool,
        stopping: Callable[[], bool],
    ) -> None:
        """Note code and settings as they are now.

        Args:
            root: repository root.
            graph: all stages.
            parent_record: record id of the pipeline run.
            force: have stages run even when nothing changed.
            stopping: ends waits.

        Raises:
            WorkerRefused: changes that no commit has.
        """
        self.root = root
        self._graph = graph
        self._parent_record = parent_record
        self._force = force
        self._stopping = stopping
        # Noted once: an edit in the middle of a pipeline must not give its stages two codes.
        self._commit = code_commit(root)
        self._params = (root / "params.yaml").read_text(encoding="utf-8")
        self._merging = threading.Lock()

    def log(self, name: str) -> Path:
        """Where a stage's output goes, as far as it comes here."""
        return self.root / "runs" / "logs" / f"{name}.log"

    def request(self, name: str, *, patience_s: float | None = None) -> StageRequest:
        """What a worker has to know to run a stage now.

        Args:
            name: the stage.
            patience_s: how long the worker may wait for its clone; None: until it is free.
        """
        lock = needed_entries(self._graph, versioning.read_lock(self.root), name)
        return StageRequest(
            name,
            self._commit,
            self._params,
            lock,
            self._force,
            self._parent_record,
            self._parent_run(),
            patience_s,
        )

    def _parent_run(self) -> str | None:
        """The pipeline's run in MLflow, when workers can reach the same server."""
        if TRACKING_URI not in os.environ:
            return None
        record = Record(records_dir(self.root) / self._parent_record)
        deadline = time.monotonic() + PARENT_RUN_WAIT_S
        while record.mlflow_run_id is None and time.monotonic() < deadline:
            if self._stopping():
                break
            time.sleep(0.2)
        return record.mlflow_run_id

    def accept(self, name: str, reply: StageReply, where: str) -> StageOutcome:
        """Merge a reply: the lock entry, what the pipeline shows of the outputs, the run's record.

        Args:
            name: the stage that was asked for.
            reply: what came back.
            where: the worker, for the message.

        Returns:
            How the stage went; a reply that cannot be believed is a failure, and changes nothing.
        """
        with self._merging:
            return self._accept(name, reply, where)

    def _accept(self, name: str, reply: StageReply, where: str) -> StageOutcome:
        def failed(message: str) -> StageOutcome:
            return StageOutcome(name, "failed", reply.seconds, message, self.log(name))

        if reply.entry is None:
            try:
                keep_files(self.root, reply.files)
            except ValueError as problem:
                return failed(f"{name}: {problem}")
            status: OutcomeStatus = "refused" if reply.status == "refused" else "failed"
            return StageOutcome(name, status, reply.seconds, reply.message, self.log(name))
        # A worker's clone may have had other inputs under the same paths; its result would be a lie
        # here.
        if foreign := foreign_inputs(reply.entry, versioning.read_lock(self.root)):
            return failed(f"{name}: {where} ran on another version of {', '.join(foreign)}")
        # Before the figures: the outputs are on the remote, whatever becomes of what is only shown.
        merge_entries(self.root, {name: reply.entry})
        message = f"{reply.message} (in {where})"
        try:
            data_remote.pull(self.root, self._shown(name, reply))
        except data_remote.RemoteFailed as problem:
            message += f"; figures not here yet: {problem}"
        try:
            keep_files(self.root, reply.files)
        except ValueError as problem:
            return failed(f"{name}: {problem}")
        status = "ran" if reply.status == "ran" else "skipped"
        return StageOutcome(name, status, reply.seconds, message, self.log(name))

    def _shown(self, name: str, reply: StageReply) -> list[str]:
        """What this clone brings of a stage's outputs: metrics, plots and what its run logs."""
        with versioning.open_repo(self.root) as repo:
            stage = versioning.load_stage(repo, self.root, name)
            shown = [str(out.def_path) for out in stage.outs if out.metric or out.plot]
        for path, data in reply.files.items():
            if path.endswith("/result.json"):
                result: dict[str, Any] = json.loads(base64.b64decode(data))
                shown += [*result["artifacts"], *result["datasets"].values()]
        return data_remote.tracked(self.root, dict.fromkeys(shown))


def send_present_results(root: Path, stale: Mapping[str, str]) -> None:
    """Push what this clone has of up-to-date stages, so that workers find their inputs.

    Args:
        root: the pipeline's clone.
        stale: stages that will be made anew, whose old outputs nobody reads.

    Raises:
        RemoteFailed: the remote does not answer.
    """
    done = [name for name in versioning.read_lock(root) if name not in stale]
    with versioning.open_repo(root) as repo:
        present = []
        for name in done:
            stage = versioning.load_stage(repo, root, name)
            # A clone that has never seen the data has nothing to send: it is on the remote already.
            present += [str(out.def_path) for out in stage.outs if not out.changed_cache()]
    data_remote.push(root, present)
