"""How a pipeline ended, as a state of its Prefect flow run.

Automations, the UI and whoever watches the server read the state alone, so it says what the command
line's exit code says.
"""

from __future__ import annotations

from collections.abc import Collection

from prefect import State
from prefect.states import Cancelled, Completed, Failed

from flows.running.stage_runner import StageOutcome


def pipeline_state(outcomes: Collection[StageOutcome], *, stopped: bool) -> State:
    """The final state of a pipeline's flow run.

    Args:
        outcomes: of every stage.
        stopped: whether somebody ended the run: a signal, or the UI's button.

    Returns:
        Cancelled; Failed, named Refused where every problem is one that a retry cannot cure;
        Completed. The message counts the stages and names what went wrong.
    """
    counts = [outcome.status for outcome in outcomes]
    text = ", ".join(f"{counts.count(kind)} {kind}" for kind in sorted(set(counts)))
    if stopped:
        return Cancelled(message=f"Stopped; every stage was ended. {text}".strip())
    problems = [one for one in outcomes if one.status in {"failed", "refused"}]
    if problems:
        name = "Refused" if all(one.status == "refused" for one in problems) else "Failed"
        return Failed(name=name, message="; ".join([text, *(one.message for one in problems)]))
    if any(not one.ok for one in outcomes):
        return Failed(message=text)
    return Completed(message=text)
