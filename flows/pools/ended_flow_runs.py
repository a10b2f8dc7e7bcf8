"""Tells the Prefect server of flow runs that ended while it, or they, could not."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import httpx
from prefect import State
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)
from prefect.states import Cancelled, Completed, Crashed

from flows.records.owners import forget_flow_run, note_flow_run_end, ownerless_flow_runs

ANSWER_S = 5.0


def tell_end(root: Path, flow_run_id: str, state: State) -> bool:
    """Give a flow run its final state, if the server answers at once; otherwise keep it for later.

    A run that has ended on the server, or that it does not know, is left as it is.

    Returns:
        Whether the server answered.
    """
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        try:
            with SyncPrefectClient(
                PREFECT_API_URL.value(),
                auth_string=PREFECT_API_AUTH_STRING.value(),
                httpx_settings={"timeout": ANSWER_S},
            ) as client:
                present = client.read_flow_run(UUID(flow_run_id)).state
                if present is None or not present.is_final():
                    client.set_flow_run_state(UUID(flow_run_id), state, force=True)
                _end_tasks(client, UUID(flow_run_id), state)
        except ObjectNotFound:
            # Another server's, or a database that was deleted.
            pass
        except (httpx.HTTPError, PrefectHTTPStatusError):
            note_flow_run_end(root, flow_run_id, state.type.value, state.message or "")
            return False
    forget_flow_run(root, flow_run_id)
    return True


def _end_tasks(client: SyncPrefectClient, flow_run_id: UUID, state: State) -> None:
    """Tasks that the server takes for running, or about to run, end with their flow run."""
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    for task in client.read_task_runs(flow_run_filter=of_run):
        if task.state is None or task.state.is_final():
            continue
        if not task.state.is_running():
            end: State = Cancelled(message="It did not begin before its flow run ended.")
        elif state.is_completed():
            end = Completed(message="The server was away when it ended.")
        else:
            end = Crashed(message=state.message)
        client.set_task_run_state(task.id, end, force=True)


def close_killed_flow_runs(root: Path) -> int:
    """Tell how flow runs of this clone ended whose process has gone; returns how many.

    For pipelines in a terminal, which no worker watches. One that was killed is crashed.
    """
    message = "Its process was killed; what had ended is kept, the next run goes on from there."
    killed: State = Crashed(message=message)
    return sum(
        tell_end(
            root,
            flow_run_id,
            killed if end is None else State(type=StateType(end[0]), message=end[1]),
        )
        for flow_run_id, end in ownerless_flow_runs(root)
    )
