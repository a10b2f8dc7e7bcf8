"""Being asked to stop: finish the running step, save, and say how to go on.

A scheduler that takes a machine away warns first: SIGTERM (Prefect, Kubernetes, `scancel`), SIGUSR1
(Slurm ahead of a time limit), SIGINT (a person). Between the warning and the kill a run saves what
it has, so that being pre-empted costs at most one step.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from components.files.whole_files import write_text

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED_FILE = "interrupted.json"
"""In a state's folder: the step at which the run was asked to stop and saved."""


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved its state; the message is one line."""


class StopRequest:
    """Whether this process has been asked to stop."""

    def __init__(self) -> None:
        """Not yet."""
        self._name = ""

    def __bool__(self) -> bool:
        """Asked."""
        return bool(self._name)

    @property
    def signal_name(self) -> str:
        """By which signal, such as "SIGTERM"; empty: not asked."""
        return self._name

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler.

        Raises:
            KeyboardInterrupt: a second Ctrl-C does not wait for the step.
        """
        if self._name and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Only noted: the training loop asks between two steps, when a state is whole.
        self._name = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Turn the signals that ask for an end into a `StopRequest` while the block lasts.

    In another thread than the main one nothing is changed: Python handles signals there alone.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note_interruption(state_dir: Path, name: str, step: int, steps: int) -> TrainingInterrupted:
    """Leave the step for whoever launched this process, and the exception to raise."""
    text = json.dumps({"step": step, "steps": steps}) + "\n"
    # Every rank says so, each under a temporary name of its own.
    write_text(state_dir / INTERRUPTED_FILE, text, contended=True)
    return TrainingInterrupted(_line(name, step, steps))


def forget_interruption(state_dir: Path) -> None:
    """Before a run goes on: what interrupted an earlier one is past."""
    (state_dir / INTERRUPTED_FILE).unlink(missing_ok=True)


def raise_interruption(state_dir: Path, name: str) -> None:
    """In a launcher whose ranks have ended: raise what they left, if they were asked to stop.

    Raises:
        TrainingInterrupted: they were.
    """
    try:
        left = json.loads((state_dir / INTERRUPTED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    raise TrainingInterrupted(_line(name, int(left["step"]), int(left["steps"])))


def _line(name: str, step: int, steps: int) -> str:
    return f"{name}: interrupted, saved at step {step} of {steps}; run it again to go on"


def advised_minutes(write_s: float, interruptions_per_day: float) -> float:
    """Minutes between checkpoints that lose least time: sqrt(2 * write time * time between faults).

    Young's first-order optimum (Communications of the ACM 17, 1974), for writes that stop training.

    Args:
        write_s: time that training stands still for a checkpoint, above 0.
        interruptions_per_day: above 0.
    """
    between_s = 86400.0 / interruptions_per_day
    return float((2.0 * write_s * between_s) ** 0.5 / 60.0)
