"""Files of work pools, automations and deployments are what Prefect accepts."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
import yaml
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.events.schemas.events import ReceivedEvent
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.server.events.schemas.automations import EventTrigger
from prefect.utilities.templating import apply_values
from prefect.workers.process import ProcessJobConfiguration

from flows import environment
from flows.pipeline import deployed
from flows.pools.automations import (
    AutomationInvalid,
    automations_dir,
    read_automation,
    scoped,
)
from flows.pools.work_pools import (
    PoolFile,
    PoolsInvalid,
    job_template,
    prefect_template,
    read_pools,
)
from flows.versioning.graph import stage_graph

PLACE = "{{ $ULTRAFLUX_PROJECT }}"


def test_process_pools_exist_for_every_pool_that_stages_name(root: Path) -> None:
    pools = read_pools(root, "process")
    names = {pool.name for pool in pools.pools}
    assert {node.meta.pool for node in stage_graph(root).values()} <= names
    assert "pipelines" in names


def test_process_jobs_do_not_hang_on_a_worker_that_was_killed(root: Path) -> None:
    pools = read_pools(root, "process")
    for pool in pools.pools:
        template = job_template(pools, pool)
        # Prefect's own check of templates: every placeholder has a variable.
        WorkPoolCreate(name=pool.name, type=pools.type, base_job_template=template)
        job = ProcessJobConfiguration.model_validate(
            {
                name: template["variables"]["properties"][name].get("default")
                for name in ("command", "stream_output", "working_dir")
            }
        )
        assert job.stream_output is False
        env = template["variables"]["properties"]["env"]["default"]
        assert env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_templates_keep_every_variable_of_prefects_own_and_use_what_they_declare(
    root: Path, kind: str
) -> None:
    pools = read_pools(root, kind)
    own = prefect_template(pools.type)
    for pool in pools.pools:
        template = job_template(pools, pool)
        variables = template["variables"]["properties"]
        assert set(own["variables"]["properties"]) <= set(variables)
        assert set(own["job_configuration"]) <= set(template["job_configuration"])
        used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
        assert used == set(variables)
        WorkPoolCreate(name=pool.name, type=pools.type, base_job_template=template)
        defaults = {n: v["default"] for n, v in variables.items() if v.get("default") is not None}
        schema = {"type": "object", "definitions": template["variables"].get("definitions", {})}
        jsonschema.validate(defaults, {**schema, "properties": variables})


def test_a_kubernetes_job_is_complete(root: Path) -> None:
    pools = read_pools(root, "kubernetes")
    gpu = next(pool for pool in pools.pools if pool.name == "gpu")
    template = job_template(pools, gpu)
    values = {n: v.get("default") for n, v in template["variables"]["properties"].items()}
    job = apply_values(template["job_configuration"], values)["job_manifest"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert container["workingDir"] == values["env"]["ULTRAFLUX_ROOT"]
    assert isinstance(job["spec"]["ttlSecondsAfterFinished"], int)


def test_a_default_for_a_variable_that_the_template_lacks_is_named(root: Path) -> None:
    pools = read_pools(root, "process")
    wrong = PoolFile.model_validate({**pools.model_dump(), "defaults": {"imagee": "x"}})
    with pytest.raises(PoolsInvalid, match=r"defaults\.imagee.*working_dir"):
        job_template(wrong, wrong.pools[0])


def test_wrong_pool_files_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "work-pools"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text("type: process\npools:\n- {name: cpu, description: d}\n")
    (folder / "b.yaml").write_text("type: [\n")
    with pytest.raises(PoolsInvalid, match=r"a\.yaml: pools\.0\.concurrency_limit: field required"):
        read_pools(tmp_path, "a")
    with pytest.raises(PoolsInvalid, match=r"b\.yaml: not YAML"):
        read_pools(tmp_path, "b")
    with pytest.raises(PoolsInvalid, match="there: a, b"):
        read_pools(tmp_path, "slurm")


def test_every_automation_file_fits_prefects_schema(root: Path) -> None:
    names = []
    for path in sorted(automations_dir(root).glob("*.yaml")):
        values = scoped(read_automation(path), "mine")
        actions = [
            {key: value for key, value in action.items() if key != "webhook"}
            | ({"block_document_id": "0" * 32} if "webhook" in action else {})
            for action in values["actions"]
        ]
        names.append(AutomationCore.model_validate({**values, "actions": actions}).name)
    assert len(names) == len(set(names)) == 6
    assert all(name.startswith("mine-") for name in names)


def flow_run_event(name: str, tags: list[str]) -> ReceivedEvent:
    """What the server tells automations of a flow run."""
    return ReceivedEvent(
        occurred=datetime.now(UTC),
        received=datetime.now(UTC),
        event=f"prefect.flow-run.{name}",
        resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},
        related=[
            {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
            for tag in tags
        ],
        id=uuid4(),
    )


def test_no_automation_looks_at_a_run_of_somebody_else(root: Path) -> None:
    for path in automations_dir(root).glob("*.yaml"):
        trigger = EventTrigger.model_validate(scoped(read_automation(path), "mine")["trigger"])
        for event in sorted(trigger.after | trigger.expect):
            name = event.removeprefix("prefect.flow-run.")
            for tags, is_ours in (
                (["mine", "stage"], True),
                (["pipeline", "mine"], True),
                (["stage"], False),
                (["mine-too"], False),
                ([], False),
            ):
                told = flow_run_event(name, tags)
                assert trigger.covers_resources(told.resource, told.related) is is_ours
    # And what is ours says so.
    content = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))
    for deployment in content["deployments"]:
        assert "{{ $ULTRAFLUX_PROJECT }}" in deployment["tags"]


@pytest.mark.parametrize(
    "trigger",
    [
        {"type": "compound", "triggers": []},
        {"type": "event", "match": {"prefect.resource.id": "prefect.deployment.*"}},
        {
            "type": "event",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": {"prefect.resource.role": "flow"},
        },
    ],
)
def test_an_automation_that_cannot_be_narrowed_is_refused(trigger: dict[str, Any]) -> None:
    with pytest.raises(AutomationInvalid, match="a: trigger"):
        scoped({"name": "a", "trigger": trigger}, "mine")


def test_no_healthy_run_is_taken_for_lost(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", raising=False)
    # Pipelines in a terminal have no work pool that sets it.
    environment.prepare()
    trigger = read_automation(automations_dir(root) / "heartbeat_lost.yaml")["trigger"]
    pools = [read_pools(root, kind) for kind in ("process", "docker", "kubernetes")]
    given = [os.environ, *(pool.defaults["env"] for pool in pools)]
    assert {env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] for env in given} == {"30"}
    assert trigger["within"] == 3 * 30
    ends = {event.removeprefix("prefect.flow-run.") for event in trigger["expect"]}
    own = re.findall(r'"(Skipped|Refused|CloneBusy|Failed)"', Path(deployed.__file__).read_text())
    assert (
        set(own) | {"heartbeat", "Completed", "Crashed", "Cancelling", "Cancelled", "GivenUp"}
        == ends
    )


def test_one_automation_alone_waits_for_a_lost_run(root: Path) -> None:
    files = [read_automation(path) for path in automations_dir(root).glob("*.yaml")]
    event = "prefect.flow-run.HeartbeatLost"
    waiting = [
        values["name"]
        for values in files
        if any(fnmatch(event, pattern) for pattern in values["trigger"]["expect"])
    ]
    assert waiting == ["heartbeat-retry"]


def test_a_file_that_is_no_automation_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("- 1\n")
    with pytest.raises(AutomationInvalid, match="a mapping with a `name`"):
        read_automation(path)


def test_deployments_are_unscheduled_run_local_code_and_show_the_settings(root: Path) -> None:
    content = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))
    assert content["pull"] == []
    seen = set()
    for deployment in content["deployments"]:
        assert deployment["schedules"] == []
        assert "pull" not in deployment
        flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
        assert isinstance(flow, Flow)
        assert "SettingsOverrides" in str(flow.parameters.properties["settings"])
        assert "DitStageOverrides" in (flow.parameters.definitions or {})
        seen.add((flow.name, deployment["name"], deployment["work_pool"]["name"]))
    assert seen == {
        ("ultraflux-pipeline", PLACE, f"{PLACE}-pipelines"),
        ("stage", f"{PLACE}-cpu", f"{PLACE}-cpu"),
        ("stage", f"{PLACE}-gpu", f"{PLACE}-gpu"),
    }


def test_the_slurm_script_is_bash_and_names_modules_that_exist(root: Path) -> None:
    script = root / "conf" / "slurm" / "dit_stage.sbatch"
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = script.read_text(encoding="utf-8")
    embedded = text.split("<<'PYTHON'\n")[1].split("\nPYTHON\n")[0]
    compile(embedded, "params", "exec")
    for module in re.findall(r"python -m (components[\w.]+)", text):
        assert (root / f"{module.replace('.', '/')}.py").is_file()
