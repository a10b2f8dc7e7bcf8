"""One run of the whole graph from start to end: preflight, record, engine, summary."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from components.files.weight_folders import file_digest
from components.settings.schema import load_settings
from flows import environment
from flows.pipeline.preflight import PipelineRefused, preflight
from flows.pipeline.rehearsal import RehearsalFailed, rehearse_if_due
from flows.records.costs import pipeline_cost
from flows.records.owners import close_ownerless, own_record
from flows.records.provenance import changes_since_commit, provenance_tags
from flows.records.records import (
    RUN_TAGS,
    Record,
    RunDescription,
    RunResult,
    Status,
    close_interrupted,
    latest_finished,
    maker_of,
    open_record,
    unsent_records,
)
from flows.remote.data_remote import RemoteFailed, configure
from flows.remote.lock_entries import stale_without_data
from flows.remote.remote_requests import send_present_results
from flows.remote.remote_stage import code_commit
from flows.remote.stage_messages import WorkerRefused
from flows.running.clone_lock import clone_lock
from flows.running.console import PipelineConsole
from flows.running.dvc_repro import DvcRunner
from flows.running.graph_walk import Report, walk_graph
from flows.running.stage_runner import StageOutcome, StageRunner, stopping_on_signals
from flows.running.warm_start import WarmStart
from flows.services.prefect_connection import API_URL, connect_to_prefect
from flows.tracking.uploader_process import NOT_SENT, UploaderProcess
from flows.versioning import graph as versioning
from flows.versioning.clone import Clone
from flows.versioning.lock_hashes import out_hashes
from flows.versioning.parameters import flatten
from flows.versioning.setting_overrides import read_params

Engine = Literal["local", "prefect", "pools"]
CHANGES_FILE = "changes.diff"
"""In a pipeline's record: tracked changes beyond its commit."""


@dataclass(frozen=True)
class PipelineSummary:
    """How a pipeline run ended."""

    outcomes: Mapping[str, StageOutcome]
    seconds: float
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether every stage ran or was up to date."""
        return not self.interrupted and all(outcome.ok for outcome in self.outcomes.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for scripts."""
        stages = {
            name: {"status": one.status, "seconds": one.seconds, "message": one.message}
            for name, one in self.outcomes.items()
        }
        ended = {"ok": self.ok, "interrupted": self.interrupted, "seconds": self.seconds}
        return {**ended, "stages": stages}


def run_pipeline(
    root: Path,
    *,
    engine: Engine,
    force: bool = False,
    until: str | None = None,
    cpus: int | None = None,
    remote_data: bool = False,
    rehearsal: bool = False,
) -> PipelineSummary:
    """Bring every stage up to date; one run at a time in a clone, a second waits for the first.

    Args:
        root: repository root.
        engine: "local" needs no server; "prefect" runs the same graph as a Prefect flow; "pools"
            sends each stage to the work pool that dvc.yaml names.
        force: run stages even when nothing changed.
        until: last stage: it and what it needs; None: all.
        cpus: cores of this machine to hand out (engines local and prefect; None: all).
        remote_data: engine pools: workers have clones of their own, data goes over the DVC remote.
        rehearsal: rehearse the corpus stages on a sample before a large source is read (engines
            local and prefect: a pool's workers may have other data and devices).

    Raises:
        PipelineRefused, SettingsError, ServiceError, versioning.GraphError: nothing was started.
    """
    # Before the lock: what cannot start must not wait for hours to say so.
    preflight(root)
    rehearsal = rehearsal and engine != "pools"
    if engine == "pools" or (engine == "prefect" and API_URL in os.environ):
        connect_to_prefect(root)
    with ExitStack() as stack:
        try:
            held = stack.enter_context(clone_lock(root, print))
        except KeyboardInterrupt:
            return PipelineSummary({}, 0.0, interrupted=True)
        return _run_pipeline(Clone(root), engine, force, held, until, cpus, remote_data, rehearsal)


def _run_pipeline(
    clone: Clone,
    engine: Engine,
    force: bool,
    held: int,
    until: str | None,
    cpus: int | None,
    remote_data: bool,
    rehearsal: bool,
) -> PipelineSummary:
    """`run_pipeline` in a clone that is held."""
    root = clone.root
    started = time.monotonic()
    settings = load_settings(root / "params.yaml")
    environment.prepare(offline=settings.runtime.offline)
    if remote_data:
        graph, stale = _graph_and_stale_elsewhere(clone, until, force=force)
    else:
        with clone.opened():
            graph = clone.graph(until)
            stale = clone.stale(graph)
        if rehearsal and "ingest" in stale:
            try:
                rehearse_if_due(root, settings, otherwise="--no-rehearsal")
            except RehearsalFailed as problem:
                raise PipelineRefused(str(problem)) from None
    close_ownerless(root)
    # What somebody has named (a reproduction, a sweep's set) is a run also where nothing is to do.
    is_named = bool(os.environ.get(RUN_TAGS))
    if not (stale or force or engine == "pools" or is_named or unsent_records(root)):
        return _nothing_to_do(root, graph, started)
    # Each stage's own line says so too, when its hours have passed.
    for name, doubt in settings.doubts():
        if name in graph and (force or name in stale):
            print(f"warning: {name}: {doubt}")
    record = open_record(root, _description(root, engine))
    own_record(root, record.record_id)
    # Now, not at the end: the clone may be edited while stages run.
    kept = _keep_sources(root, record)
    # Only once the record is there: the pipeline's run has to exist before its stages' runs.
    uploader = UploaderProcess(root)
    runner: StageRunner
    warm = None
    if remote_data:
        remote_pool_runner = importlib.import_module("flows.pools.remote_pool_runner")
        runner = remote_pool_runner.RemotePoolRunner(
            root, graph, parent_record=record.record_id, stale=stale, say=print, force=force
        )
    elif engine == "pools":
        pool_runner = importlib.import_module("flows.pools.pool_runner")
        runner = pool_runner.PoolRunner(
            root, graph, parent_record=record.record_id, stale=stale, force=force
        )
    else:
        to_run = [name for name in graph if force or name in stale]
        # One stage imports by itself what it needs, in the same time.
        warm = WarmStart(root, to_run, runtime=settings.runtime) if len(to_run) > 1 else None
        runner = DvcRunner(
            root,
            graph,
            parent_record=record.record_id,
            stale=stale,
            cpus=cpus,
            force=force,
            held=(held,),
            warm=warm,
        )
    interrupted = False
    outcomes: dict[str, StageOutcome] = {}

    console = PipelineConsole(runner)

    def report(outcome: StageOutcome) -> None:
        outcomes[outcome.name] = outcome
        console.report(outcome)

    try:
        with ExitStack() as stack:
            if engine == "prefect":
                from flows.services.embedded_prefect import embedded_prefect
                from flows.services.servers import ServiceEnded

                console.console.print("Starting the Prefect server")
                try:
                    stack.enter_context(embedded_prefect(root))
                except ServiceEnded as problem:
                    # What shows the work must not prevent it.
                    console.console.print(
                        f"{problem}: the pipeline goes on without it", soft_wrap=True
                    )
                    engine = "local"
            if warm is not None:
                stack.callback(warm.close)
            stack.enter_context(console)
            stack.enter_context(stopping_on_signals(runner))
            outcomes.update(_run(engine, runner, report))
            # Cancelled in the Prefect UI: no signal came.
            interrupted = runner.stopping
    except KeyboardInterrupt:
        interrupted = True
        runner.stop()
    console.summarise(outcomes.values())
    summary = PipelineSummary(outcomes, time.monotonic() - started, interrupted)
    # Before the result is written: a record without an end would look as if it still went on.
    close_interrupted(root, record.record_id)
    result = _result(root, summary, [*kept, *_keep(root, record, "dvc.lock")])
    spent = pipeline_cost(
        {o.name: o.seconds for o in outcomes.values()},
        {name: node.meta.gpus for name, node in graph.items()},
        settings.runtime.gpu_hour_price,
    )
    record.finish(replace(result, metrics=result.metrics | spent))
    console.console.print("Sending the rest to MLflow")
    if not uploader.drain():
        console.console.print(NOT_SENT)
    return summary


def _nothing_to_do(
    root: Path, graph: dict[str, versioning.StageNode], started: float
) -> PipelineSummary:
    """Say of every stage that it is as before; without a server, and nothing worth a record."""
    runner = DvcRunner(root, graph, parent_record=None, stale={})
    outcomes = walk_graph(runner, PipelineConsole(runner).report)
    return PipelineSummary(outcomes, time.monotonic() - started)


def _graph_and_stale_elsewhere(
    clone: Clone, until: str | None, *, force: bool
) -> tuple[dict[str, versioning.StageNode], dict[str, str]]:
    """Graph, and what is stale on a clone that need not have the data; sends what it has."""
    try:
        # Each worker checks its own clone against this commit: without one nothing can be asked.
        code_commit(clone.root)
        # It writes DVC's configuration, so it comes before the unit that reads it.
        configure(clone.root)
        with clone.opened():
            graph = clone.graph(until)
            stale = stale_without_data(clone.root, graph)
        if stale or force:
            send_present_results(clone.root, stale)
    except (WorkerRefused, RemoteFailed) as problem:
        raise PipelineRefused(str(problem)) from None
    return graph, stale


def _run(engine: Engine, runner: StageRunner, report: Report) -> dict[str, StageOutcome]:
    if engine not in {"prefect", "pools"}:
        return walk_graph(runner, report)
    # Imported by name: Prefect costs seconds and reads its environment at import.
    if engine == "prefect":
        importlib.import_module("flows.pools.ended_flow_runs").close_killed_flow_runs(runner.root)
    pipeline = importlib.import_module("flows.pipeline.prefect_flow")
    return dict(pipeline.run_in_prefect(runner, report))


def _description(root: Path, engine: Engine) -> RunDescription:
    return RunDescription(
        kind="pipeline",
        name="pipeline",
        params=dict(flatten(read_params(root))),
        tags=provenance_tags(root)
        | {"ultraflux.engine": engine}
        | json.loads(os.environ.get(RUN_TAGS, "{}")),
    )


def _maker(root: Path, name: str) -> Record | None:
    """The run that made a stage's present outputs: DVC may have restored those of an older one."""
    entry = versioning.lock_entry(root, name) or {}
    outputs = out_hashes(entry)
    return maker_of(root, name, outputs) or latest_finished(root, name)


def _keep(root: Path, record: Record, name: str, data: bytes | None = None) -> list[str]:
    """Copy a file of the clone (or `data`) into the record; its path, where there is anything."""
    if data is None:
        source = root / name
        data = source.read_bytes() if source.is_file() else b""
    if not data:
        return []
    kept = record.folder / name
    kept.write_bytes(data)
    return [str(kept.relative_to(root))]


def _keep_sources(root: Path, record: Record) -> list[str]:
    """The settings as they are now, and what the code differs in from its commit."""
    diff = _keep(root, record, CHANGES_FILE, changes_since_commit(root))
    return [*_keep(root, record, "params.yaml"), *diff]


def _result(root: Path, summary: PipelineSummary, kept: list[str]) -> RunResult:
    """The pipeline's record: which run made each stage's present result, and the report."""
    tags: dict[str, str] = {}
    metrics: dict[str, float] = {"pipeline_seconds": summary.seconds}
    for name, outcome in summary.outcomes.items():
        tags[f"stage.{name}"] = outcome.status
        made_by: Record | None = _maker(root, name)
        if made_by is not None and outcome.ok:
            tags[f"stage.{name}.run_id"] = made_by.mlflow_run_id or made_by.record_id
            result = made_by.result
            # A stage that ran sends its numbers here by itself; those of a skipped one stand at an
            # older run.
            if outcome.status == "skipped" and result is not None:
                metrics |= {f"{name}.{key}": value for key, value in result.metrics.items()}
    if (root / "dvc.lock").is_file():
        tags["dvc.lock.sha256"] = file_digest(root / "dvc.lock")
    status: Status = "FINISHED" if summary.ok else "KILLED" if summary.interrupted else "FAILED"
    counts = [o.status for o in summary.outcomes.values()]
    text = ", ".join(f"{counts.count(kind)} {kind}" for kind in sorted(set(counts)))
    report = root / "data" / "evaluate" / "report.html"
    artifacts = [str(report.relative_to(root))] if report.is_file() and summary.ok else []
    artifacts += kept
    return RunResult(status=status, metrics=metrics, tags=tags, artifacts=artifacts, summary=text)
