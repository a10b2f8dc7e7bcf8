"""`ultraflux submit`: a run of the pipeline or of one stage on a Prefect server's workers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from flows.commands.command_line import fail, refusing

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State, TaskRun
    from pydantic import ValidationError

POLL_S = 2.0
PIPELINE_FLOW = "ultraflux-pipeline"
EPILOG = (
    "Examples: [bold]ultraflux submit --watch[/]; "
    "[bold]ultraflux submit --profile single-gpu -S dit_stage1.steps=2000[/]; "
    "[bold]ultraflux submit --stage evaluate[/]. From another machine, set PREFECT_API_URL; a "
    "clone is not needed there."
)


def submit(
    stage: Annotated[
        str | None, typer.Option(help="One stage of dvc.yaml instead of the pipeline.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="Pool for --stage: cpu or gpu (default: as in dvc.yaml).")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="embedded, consumer-24gb, single-gpu or paper, instead of params.yaml."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-S", help="section.key=value in place of params.yaml's."),
    ] = None,
    remote_data: Annotated[
        bool,
        typer.Option("--remote-data", help="The pipeline as [bold]ultraflux run --remote-data[/]."),
    ] = False,
    force: Annotated[bool, typer.Option(help="Run stages even when nothing changed.")] = False,
    watch: Annotated[
        bool, typer.Option(help="Wait for the end; exit code 1 when it fails.")
    ] = False,
) -> None:
    """Submit a run to the workers of a Prefect server and print where to watch it."""
    from pydantic import ValidationError

    from components.settings.schema import SettingsError
    from flows import environment
    from flows.services.prefect_connection import connect_to_prefect
    from flows.services.servers import ServiceError
    from flows.versioning.setting_overrides import SettingsOverrides, chosen, parse_assignments

    environment.prepare()
    root = _clone()
    try:
        # What is typed first: no server is needed to know a setting or a stage.
        overrides = parse_assignments(settings or [])
        chosen(SettingsOverrides.model_validate(overrides))
    except SettingsError as problem:
        raise fail(str(problem)) from None
    except ValidationError as problem:
        raise fail(_first_error(problem)) from None
    parameters: dict[str, Any] = {"force": force}
    if overrides:
        parameters["settings"] = overrides
    if stage is None:
        if pool is not None:
            raise fail("--pool is for --stage: the pipeline's stages run where dvc.yaml says")
        pool_of_run = None
        if profile is not None:
            _check_profile(root, profile)
            parameters["profile"] = profile
        if remote_data:
            parameters["remote_data"] = True
    else:
        if profile is not None:
            raise fail("--profile is for the pipeline: a single stage takes -S section.key=value")
        if remote_data:
            raise fail("--remote-data is for the pipeline: a stage runs in its worker's clone")
        if pool not in {None, "cpu", "gpu"}:
            raise fail(f"--pool {pool}: choose cpu or gpu")
        pool_of_run = pool or _pool_of(stage)
        parameters["stage"] = stage
    with refusing(ServiceError, code=1):
        url = connect_to_prefect(root)
    from prefect import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.environment import pool_name
    from flows.services.ui_addresses import ui_of_api
    from flows.tracking.run_pages import flow_run_url

    with get_client(sync_client=True) as client:
        project = _project(client, root)
        deployment = (
            f"{PIPELINE_FLOW}/{project}"
            if pool_of_run is None
            else f"stage/{pool_name(project, pool_of_run)}"
        )
        try:
            found = client.read_deployment_by_name(deployment)
        except ObjectNotFound:
            raise fail(
                f"{url} has no deployment {deployment}: run `ultraflux deploy` there", 1
            ) from None
        run = client.create_flow_run_from_deployment(found.id, parameters=parameters, name=stage)
        print(f"submitted {run.name} to pool {found.work_pool_name}")
        print(f"watch it  {flow_run_url(ui_of_api(url), str(run.id))}")
        if watch and not _watch(client, run.id):
            raise typer.Exit(1)


def _project(client: SyncPrefectClient, root: Path | None) -> str:
    """The project whose workers are to do it: this clone's, or the only one on the server.

    Raises:
        typer.Exit: no clone here, no ULTRAFLUX_PROJECT, and none or several projects there.
    """
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    from flows.environment import PROJECT, project_name

    with refusing(ValueError):
        if root is not None or PROJECT in os.environ:
            return project_name(root or Path())
    flows = FlowFilter(name=FlowFilterName(any_=[PIPELINE_FLOW]))
    there = sorted(found.name for found in client.read_deployments(flow_filter=flows))
    if len(there) != 1:
        raise fail(
            f"no clone here, and {len(there)} projects on the server: set {PROJECT} to one of "
            f"{', '.join(there)}"
            if there
            else "no clone here and no project on the server: run `ultraflux deploy` in a clone",
            1,
        )
    return there[0]


def _clone() -> Path | None:
    from flows.environment import project_root

    try:
        return project_root()
    except FileNotFoundError:
        return None


def _check_profile(root: Path | None, profile: str) -> None:
    """Refuse here what a worker could only refuse later; without a clone its word counts.

    Raises:
        typer.Exit: no such profile.
    """
    from components.settings.schema import SettingsError
    from flows.versioning.profiles import compose

    if root is None:
        return
    with refusing(SettingsError):
        compose(root, profile)


def _pool_of(stage: str) -> str:
    """The stage's pool in the dvc.yaml of this clone.

    Raises:
        typer.Exit: no clone here, or no such stage.
    """
    from flows.commands.command_line import project_root
    from flows.versioning.graph import GraphError, stage_node

    if _clone() is None and "PREFECT_API_URL" in os.environ:
        raise fail("there is no clone here to look the stage's pool up: give --pool cpu or gpu")
    with refusing(GraphError):
        return stage_node(project_root(), stage).meta.pool


def _first_error(problem: ValidationError) -> str:
    """One line of a pydantic error."""
    from components.settings.field_errors import field_message, field_name

    error = problem.errors()[0]
    if error["type"] == "extra_forbidden":
        return f"-S {field_name(error)}: unknown setting"
    return f"-S {field_name(error)} = {error['input']!r}: {field_message(error)}"


def _watch(client: SyncPrefectClient, run_id: UUID) -> bool:
    """Print each new state of the run and of its stages until the last; whether it completed."""
    said: dict[str, str] = {}

    def tell(name: str, state: State | None, indent: str = "") -> None:
        if state is None:
            return
        text = f"{state.name}: {state.message}" if state.message else str(state.name)
        if said.get(name) != text:
            print(f"{indent}{text}", flush=True)
            said[name] = text

    while True:
        state = client.read_flow_run(run_id).state
        for task in _stages_of(client, run_id):
            if task.state is not None and not task.state.is_pending():
                tell(task.name, task.state, f"  {task.name:16} ")
        tell("", state)
        if state is not None and state.is_final():
            return state.is_completed()
        time.sleep(POLL_S)


def _stages_of(client: SyncPrefectClient, run_id: UUID) -> list[TaskRun]:
    """Task runs of a pipeline's stages, in the order of their start; none of a single stage."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        TaskRunFilter,
        TaskRunFilterTags,
    )

    found = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])),
        task_run_filter=TaskRunFilter(tags=TaskRunFilterTags(all_=["stage"])),
    )
    return sorted(found, key=lambda task: str(task.start_time or task.created))
