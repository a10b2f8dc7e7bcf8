"""What a person sees while the pipeline runs: a line per finished stage, a bar per running one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from components.telemetry.wording import legible_lines
from flows.records.records import read_json
from flows.running.stage_runner import StageOutcome, StageRunner

REFRESH_S = 0.5
PLAIN_INTERVAL_S = 15.0
_MARKS = {
    "ran": ("done", "green"),
    "skipped": ("same", "cyan"),
    "failed": ("FAILED", "red"),
    "refused": ("REFUSED", "red"),
    "blocked": ("blocked", "yellow"),
}


class PipelineConsole:
    """Live view of one pipeline run; plain lines where the output is not a terminal."""

    def __init__(self, runner: StageRunner) -> None:
        """Watch `runner`."""
        self.console = Console(soft_wrap=True, highlight=False)
        self._runner = runner
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            # Finished stages leave a line of their own; a bar that stayed would repeat it.
            transient=True,
            # In a log file a bar is thousands of lines.
            disable=not self.console.is_terminal,
        )
        self._rows: dict[str, object] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._said: dict[str, float] = {}

    def __enter__(self) -> PipelineConsole:
        """Start watching."""
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()
        self._progress.stop()

    def report(self, outcome: StageOutcome) -> None:
        """Print how a stage ended; blocked ones wait for `summarise`."""
        if outcome.status == "blocked":
            return
        mark, colour = _MARKS[outcome.status]
        seconds = f"{outcome.seconds:6.1f} s" if outcome.seconds else " " * 8
        self.console.print(
            f"[{colour}]{mark:>7}[/]  [bold]{outcome.name:<16}[/]{seconds}  ", end=""
        )
        self.console.print(legible_lines(outcome.message), markup=False)

    def summarise(self, outcomes: Iterable[StageOutcome]) -> None:
        """Name the stages that could not start, on one line."""
        names = [outcome.name for outcome in outcomes if outcome.status == "blocked"]
        if names:
            mark, colour = _MARKS["blocked"]
            self.console.print(f"[{colour}]{mark:>7}[/]  {', '.join(names)}")

    def _watch(self) -> None:
        while not self._stop.wait(REFRESH_S):
            running = self._runner.running()
            for name in running:
                position = read_json(self._runner.progress_file(name))
                self._show(name, position)
            for name in [name for name in self._rows if name not in running]:
                self._progress.remove_task(self._rows.pop(name))  # type: ignore[arg-type]

    def _show(self, name: str, position: dict | None) -> None:
        done = position["done"] if position else 0
        total = position["total"] if position else None
        if name not in self._rows:
            self._rows[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._rows[name], completed=done, total=total)  # type: ignore[arg-type]
        if not self.console.is_terminal and position:
            now = time.monotonic()
            if now - self._said.setdefault(name, now) >= PLAIN_INTERVAL_S:
                self._said[name] = now
                self.console.print(f"         {name:<16}{done} of {total}")
