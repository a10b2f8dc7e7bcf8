"""The flows behind the deployments of prefect.yaml: `stage` on the pools cpu and gpu, `pipeline`.

Workers run them in the clone that `ULTRAFLUX_ROOT` names (`ultraflux deploy --workers` sets it), or
in the one they were started in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from components.settings import SettingsError
from flows import environment, versioning
from flows.outcome_artifacts import publish_outcome
from flows.runner import StageRunner
from flows.setting_overrides import SettingsOverrides, chosen
from flows.stage_progress import reported_progress
from flows.working_trees import TreeRefused

ROOT_VARIABLE = "ULTRAFLUX_ROOT"
"""Names the clone that a worker's flows run in."""
MOST_STAGES = 64
REFUSALS = (versioning.GraphError, SettingsError, TreeRefused, FileNotFoundError)
"""What a retry cannot cure and a person has to read: one line."""


def worker_clone(clone: str | None, settings: Mapping[str, Any]) -> Path:
    """The folder that a flow of this process works in.

    Args:
        clone: a clone on this machine; None for the worker's own.
        settings: values that replace those of its params.yaml, nested; where there are any, the
            flow works in a tree of their own under `runs/submitted/`.

    Raises:
        FileNotFoundError: there is no clone.
        SettingsError: the settings are not valid.
        TreeRefused: the tree cannot be made.
    """
    named = clone or os.environ.get(ROOT_VARIABLE)
    root = environment.project_root(Path(named) if named else None)
    if settings:
        from flows.submission import submitted_tree

        root = submitted_tree(root, settings)
    # The code of that clone, before an installation that may point elsewhere.
    os.environ["PYTHONPATH"] = str(root)
    environment.prepare()
    return root


@flow(name="stage", flow_run_name="{stage}", persist_result=False)
def run_stage(
    stage: str,
    settings: SettingsOverrides | None = None,
    force: bool = False,
    clone: str | None = None,
    parent_record: str | None = None,
) -> State:
    """Bring one stage up to date through DVC.

    Args:
        stage: name in dvc.yaml.
        settings: values that replace those of params.yaml, in a working tree of their own.
        force: run it even when nothing changed.
        clone: folder of the clone on the worker's machine (default: the worker's own).
        parent_record: record of the pipeline run that this stage belongs to.
    """
    logger = get_run_logger()
    try:
        root = worker_clone(clone, chosen(settings))
        node = versioning.stage_node(root, stage)
    except REFUSALS as problem:
        return Failed(name="Refused", message=str(problem))
    runner = StageRunner(
        root, {stage: node}, parent_record=parent_record, stale={stage: "asked for"}, force=force
    )
    with reported_progress(runner.progress_file(stage)):
        outcome = runner.run(stage, prefect_run=str(flow_run.id))
    logger.info("%s in %.1f s: %s", outcome.status, outcome.seconds, outcome.message)
    publish_outcome(outcome)
    if outcome.status == "skipped":
        return Completed(name="Skipped", message=outcome.message)
    if outcome.ok:
        return Completed(message=outcome.message)
    name = "Refused" if outcome.status == "refused" else "Failed"
    return Failed(name=name, message=outcome.message)


@flow(
    name="ultraflux-pipeline",
    persist_result=False,
    task_runner=ThreadPoolTaskRunner(MOST_STAGES),  # type: ignore[arg-type]
)
def run_pipeline(
    settings: SettingsOverrides | None = None,
    profile: str | None = None,
    force: bool = False,
    clone: str | None = None,
) -> State:
    """Bring every stage up to date; each runs on the work pool that dvc.yaml names.

    Args:
        settings: values that replace those of params.yaml, in a working tree of their own.
        profile: embedded, single-gpu or paper, instead of the clone's params.yaml.
        force: run stages even when nothing changed.
        clone: folder of the clone on the worker's machine (default: the worker's own).
    """
    from flows.driver import PipelineRefused
    from flows.driver import run_pipeline as drive
    from flows.submission import profile_values

    values = chosen(settings)
    named = clone or os.environ.get(ROOT_VARIABLE)
    try:
        if profile is not None:
            own = environment.project_root(Path(named) if named else None)
            values = profile_values(own, profile, values)
        root = worker_clone(clone, values)
        os.chdir(root)
        summary = drive(root, engine="pools", force=force)
    except (*REFUSALS, PipelineRefused) as problem:
        return Failed(name="Refused", message=str(problem))
    counts = [outcome.status for outcome in summary.outcomes.values()]
    text = ", ".join(f"{counts.count(kind)} {kind}" for kind in sorted(set(counts)))
    if summary.ok:
        return Completed(message=text)
    problems = [o.message for o in summary.outcomes.values() if o.status in {"failed", "refused"}]
    return Failed(message="; ".join([text, *problems]))
