"""Work pools as YAML in git (`conf/work-pools/`): types, limits, job templates.

Prefect's own base job template of a type comes from the collection metadata that ships with it, so
the Docker and Kubernetes workers' packages need not be installed where one deploys from. A file
changes default values, and may bring a job configuration with variables of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.settings.field_errors import first_error
from flows.environment import PROJECT, pool_name

PoolType = Literal["process", "docker", "kubernetes"]


class PoolsInvalid(ValueError):
    """A file does not describe work pools; one line."""


class Pool(BaseModel):
    """One work pool."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Literal["pipelines", "cpu", "gpu"]
    description: str
    concurrency_limit: Annotated[int, Field(ge=1)] | None
    """Flow runs at once over all workers of the pool; null: no limit."""
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Default values of job variables of this pool."""


class PoolFile(BaseModel):
    """Content of a file in conf/work-pools/."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: PoolType
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Default values of job variables of every pool."""
    base_job_template: dict[str, Any] | None = None
    """Job configuration in place of Prefect's, and variables beside Prefect's; null: Prefect's."""
    pools: list[Pool]


def read_pools(root: Path, kind: str) -> PoolFile:
    """`conf/work-pools/<kind>.yaml`.

    Raises:
        PoolsInvalid: no such file, or a wrong field, which is named.
    """
    path = root / "conf" / "work-pools" / f"{kind}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.yaml")))
        raise PoolsInvalid(f"work pools '{kind}': no such file in conf/work-pools/; there: {known}")
    try:
        return PoolFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as problem:
        raise PoolsInvalid(f"{path.name}: {first_error(problem)}") from None
    except yaml.YAMLError as problem:
        raise PoolsInvalid(f"{path.name}: not YAML ({problem})") from None


def prefect_template(kind: PoolType) -> dict[str, Any]:
    """The base job template that Prefect's worker of a type declares."""
    import prefect.server.api.collections_data.views as views

    path = Path(next(iter(views.__path__))) / "aggregate-worker-metadata.json"
    for collection in json.loads(path.read_text(encoding="utf-8")).values():
        if kind in collection:
            found: dict[str, Any] = collection[kind]["default_base_job_configuration"]
            return found
    raise PoolsInvalid(f"work pools '{kind}': this version of Prefect has no such worker")


def job_template(pools: PoolFile, pool: Pool) -> dict[str, Any]:
    """The pool's base job template, with its defaults in the variables.

    Raises:
        PoolsInvalid: a default for a variable that the template does not have.
    """
    template = prefect_template(pools.type)
    variables = dict(template["variables"]["properties"])
    if pools.base_job_template is not None:
        variables |= pools.base_job_template["variables"]["properties"]
        template = {**template, **pools.base_job_template, "variables": template["variables"]}
    changed: dict[str, Any] = {}
    for name, value in (pools.defaults | pool.defaults).items():
        # Prefect takes unknown defaults and uses none of them: a memory limit would hold nobody.
        if name not in variables:
            raise PoolsInvalid(
                f"pool {pool.name}: defaults.{name}: the job template has no such variable; it "
                f"has {', '.join(variables)}"
            )
        changed[name] = {**variables[name], "default": value}
    return {
        "job_configuration": template["job_configuration"],
        "variables": {**template["variables"], "properties": {**variables, **changed}},
    }


def apply_pools(client: SyncPrefectClient, pools: PoolFile, project: str) -> list[str]:
    """Create or update a project's pools; returns their names on the server."""
    # Flow runs that a container or another machine executes name the same project.
    shared = {**pools.defaults, "env": {**pools.defaults.get("env", {}), PROJECT: project}}
    pools = pools.model_copy(update={"defaults": shared})
    names = []
    for pool in pools.pools:
        wanted = WorkPoolCreate(
            name=pool_name(project, pool.name),
            description=pool.description,
            type=pools.type,
            base_job_template=job_template(pools, pool),
            concurrency_limit=pool.concurrency_limit,
        )
        client.create_work_pool(wanted, overwrite=True)
        names.append(wanted.name)
    return names
