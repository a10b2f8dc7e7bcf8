"""Everything that a Prefect server is told from git: pools, deployments, automations.

Applying again changes nothing, so `ultraflux deploy` can stand in a start script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from prefect.client.schemas.objects import WorkPool

from components.telemetry.last_words import last_words
from flows.environment import PROJECT, pool_name, project_name
from flows.pools.automations import Applied, apply_automations
from flows.pools.work_pools import PoolFile, apply_pools, read_pools

DEPLOY_TIMEOUT_S = 300.0


class DeployFailed(RuntimeError):
    """The server refused something; one line."""


@dataclass(frozen=True)
class Deployed:
    """What stands on the server now."""

    project: str
    pools: list[str]
    deployments: list[str]
    automations: list[Applied]


def deploy(root: Path, kind: str) -> Deployed:
    """Apply conf/work-pools/, prefect.yaml and conf/automations/ to the connected server.

    Args:
        root: the clone.
        kind: which file of conf/work-pools/ says what the pools are.

    Everything is named and tagged after the project, so that nothing of another project or person
    on the server is touched.

    Raises:
        DeployFailed, PoolsInvalid, AutomationInvalid: one line; what was applied before stays.
    """
    from prefect import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    try:
        project = project_name(root)
    except ValueError as problem:
        raise DeployFailed(str(problem)) from None
    pools: PoolFile = read_pools(root, kind)
    with get_client(sync_client=True) as client:
        for pool in pools.pools:
            named = pool_name(project, pool.name)
            _refuse_other_type(client.read_work_pools(), named, pools.type)
        names = apply_pools(client, pools, project)
        _apply_prefect_yaml(root, project)
        ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[project]))
        deployments = sorted(
            f"{client.read_flow(found.flow_id).name}/{found.name}"
            for found in client.read_deployments(deployment_filter=ours)
        )
        automations = apply_automations(client, root, project, pools.type)
    return Deployed(project, names, deployments, automations)


def _refuse_other_type(present: list[WorkPool], name: str, kind: str) -> None:
    """Prefect would keep the old type without a word."""
    for pool in present:
        if pool.name == name and pool.type != kind:
            raise DeployFailed(
                f"work pool {name} is of type {pool.type} on the server: delete it there first "
                f"(`prefect work-pool delete {name}`) to make it one of type {kind}"
            )


def _apply_prefect_yaml(root: Path, project: str) -> None:
    """`prefect deploy --all`: Prefect's own reading of its own file."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=root,
        env=os.environ
        | {"PYTHONPATH": str(root), PROJECT: project, "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=DEPLOY_TIMEOUT_S,
    )
    if done.returncode:
        lines = (line.strip(" │╭╮╰╯─") for line in (done.stdout + done.stderr).splitlines())
        raise DeployFailed(f"prefect.yaml: {last_words(chr(10).join(lines))}")
