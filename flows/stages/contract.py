"""What every stage receives and returns.

A stage module reads settings and the outputs of earlier stages, calls the library in `components`,
writes its outputs under `data/<stage>/` and returns what is worth recording. It knows nothing of
MLflow, DVC or Prefect: `flows.running.recorded_stage` wraps it. Output bytes depend on inputs and
settings only, so durations and dates never enter them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.settings.bad_input import BadInput
from components.settings.schema import Settings
from components.telemetry.metric_log import MetricLog
from components.training.distributed.run_states import Segment


def state_folder(root: Path, stage: str, stage_key: str) -> Path:
    """`runs/<stage>/<stage_key>/`, the key shortened: where resumable work keeps its state."""
    return root / "runs" / stage / stage_key[:16]


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may use."""

    stage: str
    """Name in dvc.yaml."""
    settings: Settings
    root: Path
    """Repository root; every relative path in settings and manifests starts here."""
    state_dir: Path
    """See `state_folder`; survives kills."""
    metrics: MetricLog
    """Metrics over steps; uploaded to MLflow in the background."""
    first: int | None = None
    """Only so many records of a list or archive, for a rehearsal; None: all."""
    segments: tuple[Segment, ...] = ()
    """Of a stage that trains: which steps ran under which settings, data and code."""

    @property
    def output_dir(self) -> Path:
        """`data/<stage>/`, created."""
        folder = self.root / "data" / self.stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def input(self, *parts: str) -> Path:
        """`data/<parts>`: an output of an earlier stage (or the sample).

        Raises:
            InputMissing: it does not exist.
        """
        path = self.root.joinpath("data", *parts)
        if not path.exists():
            raise InputMissing(
                f"{self.stage}: input data/{'/'.join(parts)} is missing; run the stage that makes "
                f"it first: `dvc repro {parts[0]}`"
            )
        return path

    @contextmanager
    def failing(self, *problems: type[Exception]) -> Iterator[None]:
        """Let the stage fail by what such a problem says, after its name.

        Raises:
            StageFailed: one of `problems` was raised.
        """
        try:
            yield
        except problems as problem:
            raise StageFailed(f"{self.stage}: {problem}") from None


@dataclass(frozen=True)
class StageResult:
    """What a stage reports; files are already in `data/<stage>/`."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Headline numbers, copied to the parent run."""
    artifacts: tuple[Path, ...] = ()
    """Files or folders to log with the run (figures, tables, pages, image grids)."""
    datasets: dict[str, Path] = field(default_factory=dict)
    """Parquet tables to log as MLflow datasets, by name."""
    tags: dict[str, str] = field(default_factory=dict)
    """Lineage: digests of weights and tables."""
    promotions: tuple[dict[str, Any], ...] = ()
    """Fields of `registry.Promotion`: models to register once the run is uploaded."""
    summary: str = ""
    """One line for the terminal, such as "22 candidates, 11 kept"."""


class StageFailed(BadInput):
    """A stage that cannot go on; the message is one line: what, where, how to fix it."""

    def __init__(self, message: str, found: StageResult | None = None) -> None:
        """Keep what was found before it failed.

        Args:
            message: the line.
            found: numbers and files to record with the failed run, such as a gate's report.
        """
        super().__init__(message)
        self.found = found or StageResult()


class InputMissing(StageFailed):
    """What an earlier stage makes is not there."""
