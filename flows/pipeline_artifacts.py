"""What a pipeline run shows in the Prefect UI: a progress bar and the table of its stages."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import cast
from uuid import UUID

from prefect.artifacts import (
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.runner import StageExecutor, StageOutcome


class PipelineArtifacts:
    """Artifacts of one pipeline run, kept up to date from the threads that run its stages."""

    def __init__(self, runner: StageExecutor) -> None:
        """For the stages of `runner`."""
        self._runner = runner
        self._outcomes: dict[str, StageOutcome] = {}
        self._lock = threading.Lock()
        self._progress: UUID | None = None

    def __enter__(self) -> PipelineArtifacts:
        """Show the empty bar."""
        made = create_progress_artifact(0.0, description="Stages done, by their minutes")
        self._progress = cast(UUID, made)
        return self

    def ended(self, outcome: StageOutcome) -> None:
        """Move the bar: a stage weighs as many minutes as dvc.yaml expects of it."""
        with self._lock:
            self._outcomes[outcome.name] = outcome
            total = sum(node.meta.est_minutes for node in self._runner.graph.values())
            done = sum(
                self._runner.graph[name].meta.est_minutes
                for name, ended in self._outcomes.items()
                if ended.ok
            )
            if self._progress is not None:
                update_progress_artifact(self._progress, 100.0 * done / total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the table of what ended."""
        order = [self._outcomes[name] for name in self._runner.graph if name in self._outcomes]
        create_table_artifact(
            key="stages",
            table=[
                {"stage": o.name, "status": o.status, "seconds": round(o.seconds, 1), "": o.message}
                for o in order
            ],
            description="Stages of this pipeline run",
        )
