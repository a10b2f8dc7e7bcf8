"""Which stages would run and why, and what they took in the past: hours and cost from history.

Hours are medians of finished runs of a stage: of those with the present settings where there are
any, else of all, else the estimate in dvc.yaml; the basis is said. Interrupted runs do not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components.settings.schema import load_settings
from components.telemetry.wording import time_text
from flows.history.run_evidence import StageRun, connect, finished_runs
from flows.versioning import graph as versioning
from flows.versioning.clone import Clone

if TYPE_CHECKING:
    from rich.table import Table

_NEWEST = 20
"""Runs that a median is taken of."""
Action = Literal["run", "may run", "restore", "nothing"]


_ESTIMATED = "embedded"
"""Profile that the estimates and the memory in dvc.yaml are of."""
_ESTIMATE = "estimate"


@dataclass(frozen=True)
class StageForecast:
    """One stage of the next pipeline run."""

    stage: str
    action: Action
    """may run: it is only below a stage that runs; with equal inputs DVC skips it. restore: the
    DVC cache has its result."""
    reason: str
    """DVC's; empty for nothing."""
    hours: float
    """0 where nothing is computed."""
    basis: str
    """Where the hours come from: so many runs, or the estimate in dvc.yaml."""
    gpus: int
    memory_gb: float = 0.0
    """Peak for the candidates that there are now, by `meta` in dvc.yaml."""

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.hours * self.gpus


@dataclass(frozen=True)
class OperationsPlan:
    """The next pipeline run."""

    stages: tuple[StageForecast, ...]
    elapsed_hours: float
    """Along the slowest path through the graph: with enough cores and GPUs for all its branches."""
    gpu_hour_price: float | None = None
    """Of the settings (`runtime.gpu_hour_price`)."""
    profile: str = _ESTIMATED
    """Of the settings."""

    @property
    def hours(self) -> float:
        """One stage after the other; an upper bound, since some may be skipped."""
        return sum(stage.hours for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        """Of all stages."""
        return sum(stage.gpu_hours for stage in self.stages)

    def as_dict(self, price: float | None) -> dict[str, Any]:
        """Plain values; with a price of a GPU-hour, costs too."""
        rows = [
            {
                "stage": one.stage,
                "action": one.action,
                "reason": one.reason,
                "hours": one.hours,
                "basis": one.basis,
                "gpus": one.gpus,
                "gpu_hours": one.gpu_hours,
                "memory_gb": round(one.memory_gb, 2),
                "cost": None if price is None else one.gpu_hours * price,
            }
            for one in self.stages
        ]
        return {
            "stages": rows,
            "hours": self.hours,
            "elapsed_hours": self.elapsed_hours,
            "gpu_hours": self.gpu_hours,
            "cost": None if price is None else self.gpu_hours * price,
        }


def plan_operations(root: Path, *, mlflow: bool = True) -> OperationsPlan:
    """What `ultraflux run` would do now; nothing is changed.

    Args:
        root: the clone.
        mlflow: ask the tracking store for runs of other clones too.

    Raises:
        versioning.GraphError, components.settings.schema.SettingsError: see there.
    """
    settings = load_settings(root / "params.yaml")
    price, profile = settings.runtime.gpu_hour_price, settings.project.profile
    clone = Clone(root)
    with clone.opened():
        graph = clone.graph()
        stale = clone.stale(graph)
        actions = {name: _action(clone, node, stale) for name, node in graph.items()}
    # The tracking server may be slow: nothing is held open while it is asked.
    client = connect(root)[0] if mlflow else None
    locked = clone.lock()
    runs = finished_runs(root, {name: locked.get(name, {}) for name in graph}, client)
    stages = []
    count = _candidates(root)
    for name, node in graph.items():
        action = actions[name]
        hours, basis = 0.0, ""
        if action in {"run", "may run"}:
            hours, basis = duration(node, runs, clone.parameters(name))
        memory_gb = node.meta.memory_gb(count)
        stages.append(
            StageForecast(
                name, action, stale.get(name, ""), hours, basis, node.meta.gpus, memory_gb
            )
        )
    elapsed = _longest(graph, {one.stage: one.hours for one in stages})
    return OperationsPlan(tuple(stages), elapsed, price, profile)


def _candidates(root: Path) -> int:
    """Rows of the manifest that the stage ingest has left; 0 before the first run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(root / "data" / "ingest" / "manifest.parquet").num_rows)
    except (OSError, pa.ArrowInvalid):
        return 0


def _action(clone: Clone, node: versioning.StageNode, stale: Mapping[str, str]) -> Action:
    if node.name not in stale:
        return "nothing"
    # What is above decides by its bytes: it may give the old ones, and then DVC skips this one.
    if any(above in stale for above in node.upstream):
        # Its own reason, such as changed code, stands whatever comes from above.
        return "may run" if stale[node.name].startswith("after ") else "run"
    return "restore" if clone.has_cached_result(node.name) else "run"


def duration(
    node: versioning.StageNode, runs: Sequence[StageRun], params: Mapping[str, Any]
) -> tuple[float, str]:
    """(hours, where they come from) of a stage.

    Args:
        node: the stage.
        runs: finished runs of any stage, oldest first.
        params: the stage's present settings.
    """
    timed = [run for run in runs if run.stage == node.name and run.seconds is not None]
    wanted = _texts(params)
    same = [run for run in timed if _texts(run.params) == wanted]
    for chosen, settings in ((same, "same settings"), (timed, "other settings")):
        if chosen:
            newest = [run.seconds for run in chosen[-_NEWEST:] if run.seconds is not None]
            number = f"{len(newest)} run{'s' if len(newest) > 1 else ''}"
            return statistics.median(newest) / 3600, f"{number}, {settings}"
    return node.meta.est_minutes / 60, _ESTIMATE


def _texts(params: Mapping[str, Any]) -> dict[str, str]:
    """MLflow keeps parameters as texts."""
    return {name: str(value) for name, value in params.items()}


def _longest(graph: Mapping[str, versioning.StageNode], hours: Mapping[str, float]) -> float:
    ends: dict[str, float] = {}
    for name, node in graph.items():
        ends[name] = hours[name] + max((ends[above] for above in node.upstream), default=0.0)
    return max(ends.values(), default=0.0)


def operations_table(plan: OperationsPlan, price: float | None, only: Sequence[str] = ()) -> Table:
    """For the terminal.

    Args:
        plan: all stages.
        price: of a GPU-hour; None: no cost column.
        only: stages to show; empty: all.
    """
    from rich.markup import escape
    from rich.table import Table

    title = "The next run (time: median of past runs, or the estimate in dvc.yaml)"
    table = Table("stage", "would", "why", title=title, title_justify="left")
    for column in ("memory", "time", "GPU-hours", *(["cost"] if price is not None else [])):
        table.add_column(column, justify="right")
    table.add_column("time from")
    for one in plan.stages:
        if only and one.stage not in only:
            continue
        numbers = ["", "", ""]
        if one.basis:
            cost = f"{one.gpu_hours * (price or 0):,.2f}" if one.gpus else "-"
            numbers = [time_text(one.hours), f"{one.gpu_hours:.2g}" if one.gpus else "-", cost]
        cells = numbers if price is not None else numbers[:2]
        memory = f"{one.memory_gb:.1f} GiB" if one.basis else ""
        table.add_row(one.stage, one.action, escape(one.reason), memory, *cells, one.basis)
    return table


def operations_summary(plan: OperationsPlan, price: float | None) -> str:
    """One line of sums."""
    counts = [one.action for one in plan.stages]
    cost = "" if price is None else f", cost {plan.gpu_hours * price:,.2f}"
    named = [f"{counts.count(kind)} {kind}" for kind in ("run", "may run", "restore", "nothing")]
    guessed = any(one.basis == _ESTIMATE for one in plan.stages)
    other = (
        f"\nNo stage called {_ESTIMATE} was ever timed here: its time and memory are those of the "
        f"profile {_ESTIMATED} and say nothing of {plan.profile}"
        if guessed and plan.profile != _ESTIMATED
        else ""
    )
    return (
        f"{', '.join(text for text in named if not text.startswith('0 '))}: at most "
        f"{time_text(plan.hours)} of stages, {time_text(plan.elapsed_hours)} along the slowest "
        f"path, {plan.gpu_hours:.2g} GPU-hours{cost}{other}"
    )
