"""Every run of a clone on one page: pipelines and sweeps, whatever started them, newest first.

Records are what all ways of starting leave behind: a terminal, Prefect, a submission with settings
of its own, a sweep's set, `dvc exp run`. Each names its run in MLflow, its flow run in Prefect, its
commit and its DVC experiment, where there is one.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.records.records import Record, all_records, read_json
from flows.records.trees import record_trees

PREFECT_FILE = "prefect.json"
"""In a pipeline's record: its flow run."""
REPRODUCES_TAG = "ultraflux.reproduces"
"""Of a pipeline that `ultraflux reproduce` ran: the run that it repeats."""


@dataclass(frozen=True)
class RunLine:
    """One run."""

    record: str
    kind: str
    status: str
    """FINISHED, FAILED, KILLED or RUNNING."""
    started_ms: int
    seconds: float | None
    engine: str
    tree: str
    """Working tree relative to the clone; empty for the clone itself."""
    commit: str
    is_dirty: bool
    experiment: str
    """Name of the DVC experiment."""
    mlflow_experiment: str
    """Its id on the server that the run was sent to; empty before that."""
    mlflow_run: str
    prefect_run: str
    summary: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def pipeline_records(root: Path) -> list[Record]:
    """Pipelines of the clone and of its working trees in the order of their start."""
    found = [
        record
        for tree in record_trees(root)
        for record in all_records(tree)
        if record.run.kind == "pipeline"
    ]
    return sorted(found, key=lambda record: (record.run.started_ms, record.record_id))


class NoPipeline(ValueError):
    """A run of another kind goes by that name; one line."""


def find_pipeline(
    root: Path, name: str, fits: Callable[[str, str], bool] = operator.eq
) -> Record | None:
    """The newest pipeline of that name, in the clone or in one of its working trees.

    Args:
        root: the clone.
        name: `pipeline`, for the newest that reproduces no other, or an id.
        fits: asked with the name and a run's ids, of its record and in MLflow.

    Raises:
        NoPipeline: it is a sweep's.
    """
    for record in reversed(pipeline_records(root)):
        if name == "pipeline":
            # Not asked of ids, which all begin with it.
            if REPRODUCES_TAG not in record.run.tags:
                return record
        elif any(fits(name, one) for one in (record.record_id, record.mlflow_run_id) if one):
            return record
    for record in all_records(root):
        if record.run.kind == "sweep" and fits(name, record.record_id):
            raise NoPipeline(
                f"{name}: a sweep; name the run of one of its sets (`ultraflux history`)"
            )
    return None


def run_history(root: Path) -> Iterator[RunLine]:
    """Pipelines, sweeps and stages that ran by themselves, the newest first."""
    lines = [
        _line(root, tree, record)
        for tree in record_trees(root)
        for record in all_records(tree)
        # Stages of a pipeline stand under it.
        if record.run.kind in {"pipeline", "sweep"} or record.run.parent is None
    ]
    yield from sorted(lines, key=lambda line: line.started_ms, reverse=True)


def _line(root: Path, tree: Path, record: Record) -> RunLine:
    run, result = record.run, record.result
    tags = run.tags
    flow_run = (read_json(record.folder / PREFECT_FILE) or {}).get("flow_run_id")
    ended = None if result is None else result.ended_ms
    return RunLine(
        record=record.record_id,
        kind=run.name,
        status="RUNNING" if result is None else result.status,
        started_ms=run.started_ms,
        seconds=((ended or int(time.time() * 1000)) - run.started_ms) / 1000,
        engine=tags.get("ultraflux.engine", ""),
        tree="" if tree == root else str(tree.relative_to(root)),
        commit=tags.get("mlflow.source.git.commit", ""),
        is_dirty=tags.get("git.dirty") == "true",
        experiment=tags.get("dvc.experiment", ""),
        mlflow_experiment=record.experiment_id or "",
        mlflow_run=record.mlflow_run_id or "",
        prefect_run=str(flow_run or tags.get("prefect.flow_run_id", "")),
        summary="" if result is None else (result.error or result.summary),
    )
