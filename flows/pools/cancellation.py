"""A pipeline that no worker started notices when it is cancelled in the Prefect UI.

A worker stops the flow runs that it started. A pipeline in a terminal has nobody to do that: it has
to look at its own state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect import get_client
from prefect.exceptions import PrefectHTTPStatusError

POLL_S = 3.0


@contextmanager
def stopped_when_cancelled(
    flow_run_id: UUID, stop: Callable[[], None]
) -> Iterator[Callable[[], bool]]:
    """Call `stop` once when somebody cancels a flow run while the block runs.

    Args:
        flow_run_id: the run that this process executes.
        stop: ends what the block does; called in a thread.

    Yields:
        Whether `stop` was called.
    """
    over, cancelled = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(POLL_S):
            if _is_cancelled(flow_run_id):
                cancelled.set()
                stop()
                return

    watcher = threading.Thread(target=watch, name="cancelled-in-prefect", daemon=True)
    watcher.start()
    try:
        yield cancelled.is_set
    finally:
        over.set()
        watcher.join()


def _is_cancelled(flow_run_id: UUID) -> bool:
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run_id).state
    except (httpx.TransportError, PrefectHTTPStatusError):
        # A server that is away for a while is no reason to stop.
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())
