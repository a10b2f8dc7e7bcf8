"""How often a flow run that was lost with its machine begins again, and after which wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import sleep

from prefect import State
from prefect.runtime import flow_run
from prefect.states import Failed

MOST_RUNS = 4
"""The first start and three more: a run that takes its machine with it must not do so for ever."""
MOST_RUNS_VARIABLE = "ULTRAFLUX_MOST_RUNS"
FIRST_WAIT_S = 15.0
LONGEST_WAIT_S = 600.0


def wait_before(start: int) -> float:
    """Seconds before the work of a run's start number `start` (1: the first).

    0 for the first two, since most machines are lost once; then 15 s, doubled from start to start.
    """
    return min(FIRST_WAIT_S * 2.0 ** (start - 3), LONGEST_WAIT_S) if start > 2 else 0.0


def most_runs() -> int:
    """`ULTRAFLUX_MOST_RUNS`, or 4."""
    given = os.environ.get(MOST_RUNS_VARIABLE, "")
    return max(1, int(given)) if given.isdigit() else MOST_RUNS


def give_up_or_wait(say: Callable[[str], None], *, starts: int | None = None) -> State | None:
    """The state to end a flow run with when it began too often; otherwise waits as long as is due.

    Args:
        say: gets one line where there is a wait.
        starts: how often the run has begun, this time included (default: Prefect's own count).
    """
    started = int(flow_run.run_count or 1) if starts is None else starts
    if started > (most := most_runs()):
        return Failed(
            name="GivenUp",
            message=(
                f"begun {most} times and lost each time with its process or machine: see its "
                "worker's log, then submit it again (results that had ended are kept)"
            ),
        )
    if wait := wait_before(started):
        say(f"start {started} of at most {most} after losses: waiting {wait:.0f} s")
        sleep(wait)
    return None
