"""A flow run that takes its machine with it does not do so for ever."""

from __future__ import annotations

import pytest

from flows.pools import restarts


def test_the_first_restart_is_at_once_and_later_ones_wait_twice_as_long_each() -> None:
    waits = [restarts.wait_before(start) for start in range(1, 11)]
    assert waits == [0, 0, 15, 30, 60, 120, 240, 480, 600, 600]


def test_a_run_waits_says_so_and_ends_as_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    slept: list[float] = []
    monkeypatch.setattr(restarts, "sleep", slept.append)
    for start in (1, 2, 3, 4):
        assert restarts.give_up_or_wait(said.append, starts=start) is None
    assert slept == [15, 30]
    assert said == [
        "start 3 of at most 4 after losses: waiting 15 s",
        "start 4 of at most 4 after losses: waiting 30 s",
    ]
    state = restarts.give_up_or_wait(said.append, starts=5)
    assert state is not None
    assert state.is_failed()
    assert state.name == "GivenUp"
    assert "begun 4 times" in (state.message or "")
    monkeypatch.setenv(restarts.MOST_RUNS_VARIABLE, "1")
    state = restarts.give_up_or_wait(said.append, starts=2)
    assert state is not None
    assert "begun 1 times" in (state.message or "")
