"""What a pipeline run shows in Prefect's UI: progress, a table of stages, pictures, its report."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast
from uuid import UUID

from PIL import Image
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from components.evaluation.pages.pictures import thumbnail_uri
from flows.pools.contract_artifact import contracts_table
from flows.records.costs import COST, GPU_HOURS, pipeline_cost
from flows.records.records import Record, all_records
from flows.running.stage_runner import StageOutcome, StageRunner
from flows.services.ui_addresses import mlflow_ui
from flows.tracking.run_pages import record_url
from flows.versioning.setting_overrides import read_params

REPORT = Path("data/evaluate/report.html")
PICTURES = Path("data/generate/grid.png")
PICTURES_PX = 1024
"""Long edge of the copy inside the artifact: some 100 kB in the server's database."""


def stage_rows(
    runner: StageRunner, outcomes: dict[str, StageOutcome], price: float | None
) -> list[dict[str, Any]]:
    """A row per stage that ended, in the order of the graph, and one for their sum.

    Args:
        runner: knows the graph.
        outcomes: by stage.
        price: of a GPU-hour, None where it is not set.
    """
    rows = []
    for name in runner.graph:
        if (outcome := outcomes.get(name)) is not None:
            spent = _spent(runner, {name: outcome}, price)
            rows.append(
                {"stage": name, "status": outcome.status, "seconds": round(outcome.seconds, 1)}
                | spent
                | {"message": outcome.message}
            )
    seconds = round(sum(outcome.seconds for outcome in outcomes.values()), 1)
    total: dict[str, Any] = {"stage": "total", "status": "", "seconds": seconds}
    return [*rows, total | _spent(runner, outcomes, price) | {"message": ""}]


def _spent(
    runner: StageRunner, outcomes: dict[str, StageOutcome], price: float | None
) -> dict[str, float]:
    gpus = {name: node.meta.gpus for name, node in runner.graph.items()}
    found = pipeline_cost({name: o.seconds for name, o in outcomes.items()}, gpus, price)
    return {GPU_HOURS: round(found[GPU_HOURS], 3)} | (
        {COST: round(found[COST], 2)} if COST in found else {}
    )


def stage_records(
    root: Path, pipeline: Record | None, outcomes: Mapping[str, StageOutcome]
) -> dict[str, Record]:
    """The record behind each outcome: who made the result of a stage, or how it failed here.

    Args:
        root: repository root.
        pipeline: record of this run.
        outcomes: by stage; those that came to no record are left out.
    """
    found: dict[str, Record] = {}
    for record in all_records(root):
        run, result = record.run, record.result
        outcome = outcomes.get(run.name)
        if outcome is None:
            continue
        if not outcome.ok:
            if pipeline is not None and run.parent == pipeline.record_id:
                found.setdefault(run.name, record)
        elif result is not None and result.status == "FINISHED":
            found[run.name] = record
    return {name: found[name] for name in outcomes if name in found}


class PipelineArtifacts:
    """Artifacts of one pipeline run, kept up to date from the threads that run its stages."""

    def __init__(self, root: Path, runner: StageRunner) -> None:
        """For the stages of `runner` in the clone at `root`."""
        self._root = root
        self._runner = runner
        runtime = read_params(root).get("runtime", {})
        self._price: float | None = runtime.get("gpu_hour_price")
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
        # Stages end in threads of their own, and the server must get the shares in their order.
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
        """Write the table of what ended, with links to MLflow, contracts, pictures and report."""
        rows = stage_rows(self._runner, self._outcomes, self._price)
        pages = mlflow_ui(self._root)
        pipelines = [r for r in all_records(self._root) if r.run.kind == "pipeline"]
        pipeline = pipelines[-1] if pipelines else None
        records = stage_records(self._root, pipeline, self._outcomes)
        for row in rows:
            record = records.get(row["stage"])
            if record is not None and (address := record_url(record, pages)) is not None:
                row["mlflow"] = address
        create_table_artifact(key="stages", table=rows, description="Stages of this pipeline run")
        contracts = contracts_table(records, pages)
        if contracts is not None:
            create_markdown_artifact(contracts, key="data-contracts", description="Data contracts")
        if self._made("generate", PICTURES):
            self._pictures()
        if self._made("evaluate", REPORT):
            self._report(None if pipeline is None else record_url(pipeline, pages, REPORT.name))

    def _made(self, stage: str, output: Path) -> bool:
        outcome = self._outcomes.get(stage)
        return outcome is not None and outcome.ok and (self._root / output).is_file()

    def _pictures(self) -> None:
        """The sheet of generated images, inside the artifact: the UI may be on another machine."""
        with Image.open(self._root / PICTURES) as sheet:
            create_image_artifact(
                thumbnail_uri(sheet, PICTURES_PX),
                key="pictures",
                description="A row per prompt, a column per size",
            )

    def _report(self, link: str | None) -> None:
        """The report's address: in MLflow where a server shows it, else the file."""
        if link is not None:
            create_link_artifact(link, link_text=f"{REPORT.name} in MLflow", key="report")
        else:
            create_markdown_artifact(f"`{self._root / REPORT}`", key="report", description="Report")
