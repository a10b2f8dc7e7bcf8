"""Stages on Prefect work pools whose workers have clones of their own.

The request goes as a parameter of the stage's flow run, the reply comes back as its artifact: both
through the Prefect API. Data goes through the DVC remote. A run whose process or machine is gone is
sent again, to whichever worker of the pool takes it; the results are the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from flows.pools.outcome_artifacts import read_published_reply
from flows.pools.pool_runner import PoolRunner, StageEnded
from flows.remote.remote_requests import PipelineClone
from flows.remote.stage_messages import WorkerRefused, as_json
from flows.running.stage_runner import StageOutcome
from flows.versioning import graph as versioning

MOST_LOSSES = 3
"""Workers that a stage may be lost with before it counts as failed; meta.retries come on top."""
FIRST_PATIENCE_S, LONGEST_PATIENCE_S = 15.0, 600.0
"""How long a worker waits for its clone before the stage is offered to the pool again. Waiting for
ever could be a deadlock: pipelines hold their own clones while they wait for other workers."""
PAUSE_S = 2.0


class _SendAgain(Exception):
    """The flow run came to nothing through no fault of the stage; one line."""

    def __init__(self, message: str, *, lost: bool) -> None:
        super().__init__(message)
        self.lost = lost


class RemotePoolRunner(PoolRunner):
    """Runs stages of one pipeline run on work pools, in the workers' own clones."""

    def __init__(
        self,
        root: Path,
        graph: dict[str, versioning.StageNode],
        *,
        parent_record: str,
        stale: dict[str, str],
        say: Callable[[str], None],
        force: bool = False,
    ) -> None:
        """As the base.

        Args:
            root: the pipeline's clone; it need not have the data.
            graph: all stages.
            parent_record: record id of the pipeline run.
            stale: stages that have to run, with reasons; others are skipped at once.
            say: told one line when a stage is sent again.
            force: run stages even when nothing changed.

        Raises:
            WorkerRefused: the clone has changes that no commit has.
        """
        super().__init__(root, graph, parent_record=parent_record, stale=stale, force=force)
        self._clone = PipelineClone(
            root,
            graph,
            parent_record=parent_record,
            force=force,
            stopping=lambda: self._stopping,
        )
        self._say = say
        self._patience_s: dict[str, float] = {}

    def _repro(
        self, node: versioning.StageNode, prefect_run: str | None, started: float
    ) -> StageOutcome:
        losses = 0
        while True:
            try:
                outcome = super()._repro(node, prefect_run, started)
            except _SendAgain as again:
                message = str(again)
                if again.lost:
                    losses += 1
            else:
                if not outcome.ok:
                    # A run that ended is not asked again: its answer would be the same.
                    self._attempts[node.name] = self._attempts.get(node.name, 1) + 1
                return outcome
            self._attempts[node.name] += 1
            if self._stopping:
                message = f"{node.name}: interrupted"
            elif losses < MOST_LOSSES:
                self._say(f"{message}; sent to the pool again")
                time.sleep(PAUSE_S)
                continue
            return StageOutcome(node.name, "failed", time.monotonic() - started, message)

    def _parameters(self, name: str) -> dict[str, Any]:
        # Longer each time, see "busy" below: the pool may have one worker, whose clone is needed
        # for hours.
        patience_s = self._patience_s.setdefault(name, FIRST_PATIENCE_S)
        request = self._clone.request(name, patience_s=patience_s)
        return {"stage": name, "request": as_json(request)}

    def _ended(self, client: SyncPrefectClient, name: str, flow_run: FlowRun) -> StageOutcome:
        try:
            reply = read_published_reply(client, flow_run.id)
        except WorkerRefused as problem:
            raise StageEnded("refused", f"{name}: {problem}") from None
        state = flow_run.state
        if reply is None:
            # Without a reply, "crashed" is the machine or its process; "failed" would be the
            # stage's own end.
            if state is not None and state.is_crashed():
                raise _SendAgain(f"{name}: lost with its worker ({state.message})", lost=True)
            if state is not None and state.is_completed():
                message = f"{name}: its worker answered nothing: bring it to the pipeline's commit"
                raise StageEnded("refused", message)
            raise self._unexplained(name, flow_run)
        if reply.status == "busy":
            self._patience_s[name] = min(2 * self._patience_s[name], LONGEST_PATIENCE_S)
            raise _SendAgain(reply.message, lost=False)
        return self._clone.accept(name, reply, reply.where)
