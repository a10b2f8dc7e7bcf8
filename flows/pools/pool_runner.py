"""Stages on Prefect work pools: each is a flow run of the deployment `stage/<pool>`.

A stage task of the pipeline cannot be sent to a pool, a deployment run can. Its idempotency key
names pipeline run, stage and attempt: a pipeline that is started again (its machine died) finds the
stage runs that are still going on and waits for them instead of starting them twice.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling

from flows.environment import pool_name, project_name
from flows.pools.outcome_artifacts import read_outcome
from flows.running.dvc_repro import DvcRunner
from flows.running.stage_runner import OutcomeStatus, StageOutcome
from flows.versioning import graph as versioning

STAGE_FLOW = "stage"
POLL_S = 1.0
SERVER_AWAY_S = 900.0
"""How long the Prefect server may be away before a stage counts as failed."""
MANY_CORES = 10**6
REFUSED_PARAMETERS = {409, 422}
"""What the server answers to parameters that a deployment's schema does not have."""
HEARTBEAT_LOST = "HeartbeatLost"
"""State that conf/automations/heartbeat_lost.yaml sets; another file there schedules it again."""
LOST_GRACE_S = 60.0
"""How long a run in that state may take to be scheduled again before it counts as failed."""


class StageEnded(Exception):
    """How a stage ended, wherever that is found out."""

    def __init__(self, status: OutcomeStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def _bear(stage: str, away_since: float, problem: Exception) -> None:
    """Raise `StageEnded` where the server has been away for too long."""
    if time.monotonic() - away_since > SERVER_AWAY_S:
        message = f"{stage}: the Prefect server does not answer ({problem})"
        raise StageEnded("failed", message) from None


class PoolRunner(DvcRunner):
    """Runs stages of one pipeline run on work pools.

    The workers share the clone (same machine or a shared file system), so what a stage wrote is
    there when its flow run ends. `flows.pools.remote_pool_runner` is for workers that do not.
    """

    without_server = f"stages on pools wait for it, at most {SERVER_AWAY_S / 60:g} minutes"

    def __init__(
        self,
        root: Path,
        graph: dict[str, versioning.StageNode],
        *,
        parent_record: str,
        stale: dict[str, str],
        force: bool = False,
    ) -> None:
        """As the base; pools, not this process, limit how many stages run at once."""
        super().__init__(
            root, graph, parent_record=parent_record, stale=stale, cpus=MANY_CORES, force=force
        )
        self._flow_runs: dict[str, UUID] = {}
        self._attempts: dict[str, int] = {}

    def _repro(
        self, node: versioning.StageNode, prefect_run: str | None, started: float
    ) -> StageOutcome:
        try:
            flow_run = self._submitted(node, prefect_run or self.parent_record or "")
            with self._lock:
                self._flow_runs[node.name] = flow_run.id
            return self._await(node.name, flow_run)
        except StageEnded as end:
            return StageOutcome(node.name, end.status, time.monotonic() - started, str(end))
        finally:
            with self._lock:
                self._flow_runs.pop(node.name, None)

    def _submitted(self, node: versioning.StageNode, run: str) -> FlowRun:
        """The stage's flow run, as `_submit`; waits for a server that is away.

        Raises:
            StageEnded: the deployment is not on the server or of another clone, the server is away
                for too long, or the run is stopped.
        """
        away_since = time.monotonic()
        while True:
            try:
                # Asked again after an answer that was lost, the server finds the key it has.
                return self._submit(node, run)
            except ObjectNotFound:
                message = (
                    f"{node.name}: no deployment {self._deployment(node)} on the Prefect server: "
                    "create it with `ultraflux deploy`"
                )
                raise StageEnded("refused", message) from None
            except (httpx.TransportError, PrefectHTTPStatusError) as problem:
                if (
                    isinstance(problem, PrefectHTTPStatusError)
                    and problem.response.status_code in REFUSED_PARAMETERS
                ):
                    message = (
                        f"{node.name}: the deployment {self._deployment(node)} on the Prefect "
                        "server knows other parameters than this clone: `ultraflux deploy` here"
                    )
                    raise StageEnded("refused", message) from None
                _bear(node.name, away_since, problem)
            if self._stopping:
                raise StageEnded("failed", f"{node.name}: interrupted")
            time.sleep(POLL_S)

    def _submit(self, node: versioning.StageNode, run: str) -> FlowRun:
        """The stage's flow run: the one that a former process of this pipeline started, or new."""
        while True:
            attempt = self._attempts.setdefault(node.name, 1)
            flow_run = cast(
                FlowRun,
                run_deployment(
                    self._deployment(node),
                    parameters=self._parameters(node.name),
                    flow_run_name=node.name,
                    timeout=0,
                    # Below the pipeline's run in the UI, and cancelled with it.
                    as_subflow=True,
                    idempotency_key=f"{run}/{node.name}/{attempt}",
                    tags=["stage"],
                ),
            )
            state = flow_run.state
            # A finished run under this key was an earlier attempt of ours.
            if state is None or not state.is_final() or state.is_completed():
                return flow_run
            self._attempts[node.name] += 1

    def _deployment(self, node: versioning.StageNode) -> str:
        return f"{STAGE_FLOW}/{pool_name(project_name(self.root), node.meta.pool)}"

    def _parameters(self, name: str) -> dict[str, Any]:
        """Parameters of the stage's flow run."""
        return {
            "stage": name,
            "force": self.force,
            "clone": str(self.root),
            "parent_record": self.parent_record,
        }

    def _ended(self, client: SyncPrefectClient, name: str, flow_run: FlowRun) -> StageOutcome:
        """What came of a flow run in a final state.

        Raises:
            StageEnded: the run has not said it.
        """
        said = read_outcome(client, flow_run.id)
        completed = flow_run.state is not None and flow_run.state.is_completed()
        # They differ when a run was killed after it had said how its stage went: the state is
        # later.
        if said is not None and said.ok == completed:
            return said
        raise self._unexplained(name, flow_run)

    def _unexplained(self, name: str, flow_run: FlowRun) -> StageEnded:
        """The end of a flow run that has not said how it went."""
        state = flow_run.state
        assert state is not None
        message = f"{name}: {state.message or state.name}"
        status: OutcomeStatus = "ran" if state.is_completed() else "failed"
        return StageEnded(status, message)

    def _await(self, name: str, flow_run: FlowRun) -> StageOutcome:
        away_since: float | None = None
        lost_since: float | None = None
        while True:
            try:
                with get_client(sync_client=True) as client:
                    flow_run = client.read_flow_run(flow_run.id)
                    state = flow_run.state
                    if state is not None and state.name == HEARTBEAT_LOST:
                        lost_since = lost_since or time.monotonic()
                    else:
                        lost_since = None
                    coming_back = (
                        lost_since is not None and time.monotonic() - lost_since < LOST_GRACE_S
                    )
                    if state is not None and state.is_cancelled() and not self._stopping:
                        # Somebody's decision: not tried again.
                        message = f"{name}: cancelled in Prefect; run again to go on"
                        raise StageEnded("refused", message)
                    if state is not None and state.is_final() and not coming_back:
                        return self._ended(client, name, flow_run)
                away_since = None
            except (httpx.TransportError, PrefectHTTPStatusError) as problem:
                away_since = away_since or time.monotonic()
                _bear(name, away_since, problem)
            if self._stopping:
                self._cancel(flow_run.id)
                raise StageEnded("failed", f"{name}: interrupted")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Cancel every stage run; what they saved stays for the next run."""
        super().stop()
        with self._lock:
            waiting = list(self._flow_runs.values())
        for flow_run_id in waiting:
            self._cancel(flow_run_id)

    def _cancel(self, flow_run_id: UUID) -> None:
        try:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(flow_run_id, Cancelling(), force=False)
        except (httpx.TransportError, PrefectHTTPStatusError, ObjectNotFound):
            # Without a server there is nobody to tell; the next pipeline run finds the stage.
            return

    def running(self) -> list[str]:
        """Names of the stages that are on a pool now, waiting ones included."""
        with self._lock:
            return sorted(self._flow_runs)
