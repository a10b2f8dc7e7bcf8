"""Automations as YAML in git (`conf/automations/`), applied by name.

A file is Prefect's own automation schema with these additions:

- Name and trigger are narrowed to one project (`scoped`): other people's runs on the server are
  never matched, and two projects keep their own.
- An action `call-webhook` names `webhook: {block, url_from}` instead of a block's id; the address
  comes from an environment variable and goes into a Prefect block, so that it stays out of git. An
  automation whose variable is not set is left out (and paused where a former deployment had created
  it).
- `only_pools: [process]` leaves an automation out (as above) where workers are of another type.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore
from pydantic import SecretStr, ValidationError

from components.settings.field_errors import first_error


class AutomationInvalid(ValueError):
    """A file does not describe an automation; one line."""


@dataclass(frozen=True)
class Applied:
    """What became of one file."""

    name: str
    outcome: str
    """created, updated, unchanged, or "left out: ...". """


def automations_dir(root: Path) -> Path:
    """`conf/automations`."""
    return root / "conf" / "automations"


def read_automation(path: Path) -> dict[str, Any]:
    """The mapping in an automation file.

    Raises:
        AutomationInvalid: not YAML, or no mapping with a name.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as problem:
        raise AutomationInvalid(f"{path}: not YAML ({problem})") from None
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise AutomationInvalid(f"{path}: expected a mapping with a `name`")
    return values


def scoped(values: Mapping[str, Any], project: str) -> dict[str, Any]:
    """An automation for the runs of one project alone.

    Prefect hands every event on the server to every trigger; what tells runs apart is their tag,
    which deployments of prefect.yaml and pipelines in a terminal set.

    Args:
        values: content of a file.
        project: `flows.environment.project_name`.

    Raises:
        AutomationInvalid: a trigger that cannot be narrowed: of several events, or of other things
            than flow runs.
    """
    name, trigger = values["name"], values.get("trigger") or {}
    runs = (trigger.get("match") or {}).get("prefect.resource.id") == "prefect.flow-run.*"
    if trigger.get("type") != "event" or not runs:
        raise AutomationInvalid(f"{name}: trigger: expected an event of prefect.flow-run.*")
    if trigger.get("match_related"):
        raise AutomationInvalid(f"{name}: trigger.match_related: it is set to the project's tag")
    tag = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{project}"}
    kept = {key: value for key, value in values.items() if key != "only_pools"}
    return kept | {"name": f"{project}-{name}", "trigger": {**trigger, "match_related": tag}}


def _webhooks(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [action["webhook"] for action in values["actions"] if "webhook" in action]


def _with_blocks(values: dict[str, Any], project: str) -> dict[str, Any]:
    """Actions with the ids of their web hook blocks, which are saved first."""
    actions = []
    for action in values["actions"]:
        if "webhook" in action:
            named = action["webhook"]
            block = Webhook(method="POST", url=SecretStr(os.environ[named["url_from"]]))
            block_id = block.save(f"{project}-{named['block']}", overwrite=True)
            rest = {key: value for key, value in action.items() if key != "webhook"}
            actions.append(rest | {"block_document_id": str(block_id)})
        else:
            actions.append(action)
    return {**values, "actions": actions}


def apply_automation(
    client: SyncPrefectClient, path: Path, project: str, pools: str = "process"
) -> Applied:
    """Create or update the automation of one file; applying twice changes nothing.

    Args:
        client: of the server.
        path: the file.
        project: whose runs it acts on.
        pools: type of the work pools.

    Raises:
        AutomationInvalid: the file does not fit Prefect's schema; names the first wrong field.
    """
    values = read_automation(path)
    only = values.get("only_pools")
    values = scoped(values, project)
    name = values["name"]
    known = client.read_automations_by_name(name)
    unset = [hook["url_from"] for hook in _webhooks(values) if not os.environ.get(hook["url_from"])]
    reason = f"{unset[0]} is not set" if unset else None
    if only is not None and pools not in only:
        reason = f"not for {pools} pools"
    if reason is not None:
        for automation in known:
            client.pause_automation(automation.id)
        return Applied(name, f"left out: {reason}")
    try:
        wanted = AutomationCore.model_validate(_with_blocks(values, project))
    except ValidationError as problem:
        raise AutomationInvalid(f"{path}: {first_error(problem)}") from None
    # Names are not unique on a server; two equal automations would act twice.
    for surplus in known[1:]:
        client.delete_automation(surplus.id)
    if not known:
        client.create_automation(wanted)
        return Applied(name, "created")
    present = AutomationCore.model_validate(known[0].model_dump(exclude={"id"}))
    # Not as JSON: the sets of events have an order there.
    if present.model_dump() == wanted.model_dump():
        return Applied(name, "unchanged")
    client.update_automation(known[0].id, wanted)
    return Applied(name, "updated")


FOR_EVERYBODY = (
    "ultraflux-cancelling-lost",
    "ultraflux-failure-webhook",
    "ultraflux-heartbeat-lost",
    "ultraflux-heartbeat-retry",
    "ultraflux-pending-lost",
)
"""Automations of former versions, which acted on every run of the server."""


def apply_automations(
    client: SyncPrefectClient, root: Path, project: str, pools: str = "process"
) -> list[Applied]:
    """Apply every file of `conf/automations/`, in the order of their names.

    Automations of former versions of this project that matched everybody's runs are deleted.
    """
    removed = []
    for name in FOR_EVERYBODY:
        for old in client.read_automations_by_name(name):
            client.delete_automation(old.id)
            removed.append(Applied(name, "deleted: it acted on every run of the server"))
    files = sorted(automations_dir(root).glob("*.yaml"))
    return [*(apply_automation(client, path, project, pools) for path in files), *removed]
