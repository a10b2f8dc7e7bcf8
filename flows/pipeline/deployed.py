"""The flows behind the deployments of prefect.yaml: `stage` on the pools cpu and gpu, `pipeline`.

Workers run them in the clone that `ULTRAFLUX_ROOT` names (`ultraflux deploy --workers` sets it), or
in the one they were started in.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from components.settings.schema import SettingsError
from flows import environment
from flows.pipeline.endings import pipeline_state
from flows.pools.outcome_artifacts import publish_outcome, publish_reply
from flows.pools.restarts import give_up_or_wait
from flows.pools.stage_progress import reported_progress
from flows.remote.remote_stage import opened_here, run_remote_stage
from flows.remote.stage_messages import StageReply, WorkerRefused, read_request
from flows.running.clone_lock import CloneBusy, clone_lock
from flows.running.dvc_repro import DvcRunner, progress_path
from flows.running.recorded_stage import PREFECT_RUN
from flows.running.stage_runner import StageOutcome
from flows.running.working_trees import TreeRefused
from flows.versioning import graph as versioning
from flows.versioning.setting_overrides import SettingsOverrides, chosen

ROOT_VARIABLE = "ULTRAFLUX_ROOT"
"""Names the clone that a worker's flows run in."""
MOST_STAGES = 64
SUBMITTED_PATIENCE_S = 600.0
"""How long a stage that was submitted by itself waits for a clone. Not for ever: the run that holds
the clone may be a pipeline that waits for this stage's place in the pool."""
REFUSALS = (versioning.GraphError, SettingsError, TreeRefused, FileNotFoundError)
"""What a retry cannot cure and a person has to read: one line."""
OTHER_CLONE = (
    ": this worker does not share the pipeline's clone; for workers with clones of their own there "
    "is `ultraflux run --engine pools --remote-data`"
)


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
    if clone is not None and not Path(clone).is_dir():
        raise FileNotFoundError(f"no folder {clone} on {socket.gethostname()}{OTHER_CLONE}")
    root = environment.project_root(Path(named) if named else None)
    if settings:
        from flows.pools.submission import submitted_tree
        from flows.tracking.uploader import tracking_uri

        # The tree's runs belong to the clone's store; this process works for no other tree.
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri(root)
        # And stages of its pipeline go to the clone's pools.
        os.environ.setdefault(environment.PROJECT, environment.project_name(root))
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
    request: dict[str, Any] | None = None,
) -> State:
    """Bring one stage up to date through DVC.

    Args:
        stage: name in dvc.yaml.
        settings: values that replace those of params.yaml, in a working tree of their own.
        force: run it even when nothing changed.
        clone: folder of the clone on the worker's machine (default: the worker's own).
        parent_record: record of the pipeline run that this stage belongs to.
        request: what a pipeline in another clone asks
            (`flows.remote.stage_messages.StageRequest`); the other parameters do not count then.
    """
    if request is not None:
        return _answered(stage, request)
    logger = get_run_logger()
    if (given_up := give_up_or_wait(logger.info)) is not None:
        return given_up
    try:
        root = worker_clone(clone, chosen(settings))
        if parent_record is not None and not opened_here(root, parent_record):
            # A clone of the same path on another machine: its results would be nowhere near the
            # pipeline.
            raise FileNotFoundError(f"{root} on {socket.gethostname()}{OTHER_CLONE}")
        node = versioning.stage_node(root, stage)
        # A pipeline holds the clone for its stages.
        alone = parent_record is None
        lock = clone_lock(root, logger.info, patience_s=SUBMITTED_PATIENCE_S)
        with lock if alone else nullcontext() as held:
            outcome = _run_here(root, node, parent_record, force, held)
    except CloneBusy as problem:
        return Failed(name="Refused", message=f"{problem}: submit {stage} again later")
    except REFUSALS as problem:
        return Failed(name="Refused", message=str(problem))
    logger.info("%s in %.1f s: %s", outcome.status, outcome.seconds, outcome.message)
    publish_outcome(outcome)
    if outcome.status == "skipped":
        return Completed(name="Skipped", message=outcome.message)
    if outcome.ok:
        return Completed(message=outcome.message)
    name = "Refused" if outcome.status == "refused" else "Failed"
    return Failed(name=name, message=outcome.message)


def _run_here(
    root: Path, node: versioning.StageNode, parent_record: str | None, force: bool, held: int | None
) -> StageOutcome:
    """Run a stage in a clone that is held, by this process (`held`) or by its pipeline."""
    runner = DvcRunner(
        root,
        {node.name: node},
        parent_record=parent_record,
        stale={node.name: "asked for"},
        force=force,
        held=() if held is None else (held,),
    )
    with reported_progress(runner.progress_file(node.name)):
        return runner.run(node.name, prefect_run=str(flow_run.id))


def _answered(stage: str, values: Mapping[str, Any]) -> State:
    """Answer the request of a pipeline elsewhere, in this worker's own clone."""
    logger = get_run_logger()
    if (given_up := give_up_or_wait(logger.info)) is not None:
        return given_up
    where = socket.gethostname()
    try:
        root = worker_clone(None, {})
        where = f"{where}:{root}"
        asked = read_request(values)
        if asked.name != stage:
            raise WorkerRefused(f"asked for stage {stage} with a request for {asked.name}")
        os.environ[PREFECT_RUN] = str(flow_run.id)
        with reported_progress(progress_path(root, stage)):
            reply = run_remote_stage(
                asked,
                root=root,
                say=logger.info,
                # Prefect tells a cancelled run by its own handling of SIGTERM.
                own_signals=False,
            )
    except (*REFUSALS, WorkerRefused) as problem:
        reply = StageReply("refused", f"{stage}: {problem}")
    logger.info("%s in %.1f s: %s", reply.status, reply.seconds, reply.message)
    publish_reply(replace(reply, where=where))
    if reply.entry is not None:
        return Completed(
            name="Skipped" if reply.status == "skipped" else None, message=reply.message
        )
    name = {"refused": "Refused", "busy": "CloneBusy"}.get(reply.status, "Failed")
    return Failed(name=name, message=reply.message)


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
    remote_data: bool = False,
) -> State:
    """Bring every stage up to date; each runs on the work pool that dvc.yaml names.

    Args:
        settings: values that replace those of params.yaml, in a working tree of their own.
        profile: embedded, consumer-24gb, single-gpu or paper, instead of the clone's params.yaml.
        force: run stages even when nothing changed.
        clone: folder of the clone on the worker's machine (default: the worker's own).
        remote_data: the stages' workers have clones of their own; data goes over the DVC remote.
    """
    from flows.pipeline.pipeline_run import run_pipeline as run_graph
    from flows.pipeline.preflight import PipelineRefused
    from flows.pools.submission import profile_values

    if (given_up := give_up_or_wait(get_run_logger().info)) is not None:
        return given_up
    values = chosen(settings)
    named = clone or os.environ.get(ROOT_VARIABLE)
    try:
        if profile is not None:
            own = environment.project_root(Path(named) if named else None)
            values = profile_values(own, profile, values)
        root = worker_clone(clone, values)
        # Prefect's own reading of prefect.yaml and of relative settings starts at the working
        # folder.
        os.chdir(root)
        summary = run_graph(root, engine="pools", force=force, remote_data=remote_data)
    except (*REFUSALS, PipelineRefused) as problem:
        return Failed(name="Refused", message=str(problem))
    return pipeline_state(summary.outcomes.values(), stopped=summary.interrupted)
