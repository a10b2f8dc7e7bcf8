"""The flow run's state says what the command line says."""

from __future__ import annotations

import pytest

from flows.pipeline.endings import pipeline_state
from flows.running.stage_runner import OutcomeStatus, StageOutcome


@pytest.mark.parametrize(
    ("statuses", "stopped", "kind", "name", "message"),
    [
        (["ran", "skipped"], False, "COMPLETED", "Completed", "1 ran, 1 skipped"),
        (["skipped", "skipped"], False, "COMPLETED", "Completed", "2 skipped"),
        (["ran", "failed"], False, "FAILED", "Failed", "1 failed, 1 ran; s1 failed"),
        (["refused", "ran"], False, "FAILED", "Refused", "1 ran, 1 refused; s0 refused"),
        (
            ["refused", "blocked"],
            False,
            "FAILED",
            "Refused",
            "1 blocked, 1 refused; s0 refused",
        ),
        (
            ["failed", "refused"],
            False,
            "FAILED",
            "Failed",
            "1 failed, 1 refused; s0 failed; s1 refused",
        ),
        (["ran", "blocked"], False, "FAILED", "Failed", "1 blocked, 1 ran"),
        (["ran", "failed"], True, "CANCELLED", "Cancelled", "Stopped; every stage was ended. "),
        ([], True, "CANCELLED", "Cancelled", "Stopped; every stage was ended."),
    ],
)
def test_a_state_for_every_ending(
    statuses: list[OutcomeStatus], stopped: bool, kind: str, name: str, message: str
) -> None:
    outcomes = [
        StageOutcome(f"s{number}", status, message=f"s{number} {status}")
        for number, status in enumerate(statuses)
    ]
    state = pipeline_state(outcomes, stopped=stopped)
    assert (state.type.value, state.name) == (kind, name)
    assert (state.message or "").startswith(message)
