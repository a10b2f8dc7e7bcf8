"""What the walk over the graph, Prefect and the console ask of whoever runs single stages.

`flows.running.dvc_repro` runs them in this clone, `flows.pools` on work pools; how a stage went is
told in one form by all.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from flows.versioning import graph as versioning

OutcomeStatus = Literal["ran", "skipped", "failed", "refused", "blocked"]


@dataclass(frozen=True)
class StageOutcome:
    """How one stage went."""

    name: str
    status: OutcomeStatus
    seconds: float = 0.0
    message: str = ""
    log: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether stages below may run."""
        return self.status in {"ran", "skipped"}


def interrupted(name: str) -> StageOutcome:
    """The outcome of a stage that `stop` kept from running."""
    return StageOutcome(name, "failed", message=f"{name}: interrupted")


def blocked(name: str, blockers: list[str]) -> StageOutcome:
    """The outcome of a stage whose inputs failed."""
    return StageOutcome(name, "blocked", message=f"waits for {', '.join(blockers)}")


class StageError(RuntimeError):
    """A stage did not finish."""

    def __init__(self, outcome: StageOutcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome

    def __reduce__(self) -> tuple[type[StageError], tuple[StageOutcome]]:
        """Prefect pickles exceptions; the default would pass the message to __init__."""
        return (StageError, (self.outcome,))


class StageRunner(Protocol):
    """Runs single stages of one graph, several at once where asked from several threads."""

    root: Path
    graph: dict[str, versioning.StageNode]
    stale: dict[str, str]
    without_server: str
    """What happens while the Prefect server is away."""

    def run(self, name: str, *, prefect_run: str | None = None) -> StageOutcome:
        """Run (or skip) one stage; never raises for a failing stage."""
        ...

    def stop(self) -> None:
        """Stop every running stage; what they saved stays for the next run."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        ...

    def running(self) -> list[str]:
        """Names of the stages that run now."""
        ...

    def progress_file(self, name: str) -> Path:
        """Where the running stage writes its position."""
        ...


@contextmanager
def stopping_on_signals(runner: StageRunner) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the running stages at once; what they saved stays.

    Without this Prefect's task runner would wait for a stage to end, which may take days.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        runner.stop()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
