"""Asked to stop: which signals, what a second one does, and how often to save."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from components.training.distributed.interruption import (
    SIGNALS,
    TrainingInterrupted,
    advised_minutes,
    forget_interruption,
    listening,
    note_interruption,
    raise_interruption,
)
from components.training.distributed.rank_jobs import StateInUse, state_lock


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_request_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with listening() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name
    assert signal.getsignal(number) is before


def test_a_second_control_c_does_not_wait() -> None:
    with listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_nothing_changes() -> None:
    seen = []

    def look() -> None:
        with listening() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_the_launcher_reads_what_the_ranks_left(tmp_path: Path) -> None:
    raise_interruption(tmp_path, "vae")
    said = str(note_interruption(tmp_path, "vae", 12, 30))
    assert said == "vae: interrupted, saved at step 12 of 30; run it again to go on"
    with pytest.raises(TrainingInterrupted, match="step 12 of 30"):
        raise_interruption(tmp_path, "vae")
    forget_interruption(tmp_path)
    raise_interruption(tmp_path, "vae")


def test_youngs_interval() -> None:
    """Writes of a minute, a fault a day: sqrt(2 * 60 * 86400) s = 53.67 minutes."""
    assert advised_minutes(60.0, 1.0) == pytest.approx(53.6656, abs=1e-4)
    assert advised_minutes(240.0, 1.0) == pytest.approx(2 * 53.6656, abs=1e-3)
    assert advised_minutes(60.0, 4.0) == pytest.approx(53.6656 / 2, abs=1e-4)


def test_a_state_is_held_by_one_process(tmp_path: Path) -> None:
    # Another opening of the file is another holder, as another process would be.
    with (
        state_lock(tmp_path),
        pytest.raises(StateInUse, match=str(os.getpid())),
        state_lock(tmp_path),
    ):
        pass
    with state_lock(tmp_path):
        pass


def test_ranks_that_are_interrupted_at_once_do_not_take_each_others_file(tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(200):
            note_interruption(tmp_path, "dit_stage1", 5, 30)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0, 0]
